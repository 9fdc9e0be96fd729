"""Real DPO runs whose fate is measured without the audit, and what each set of alert rules says of them."""
