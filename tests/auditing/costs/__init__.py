"""What an audit costs, counted before it is made."""
