"""A run over time: when to audit, and what follows from an audit."""
