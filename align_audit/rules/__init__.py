"""The table of alert rules: names, causes, limits. Data only."""
