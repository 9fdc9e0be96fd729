"""What options are made of: the table of alert rules and their limits, settings of rules, the webhook, lines of YAML files."""
