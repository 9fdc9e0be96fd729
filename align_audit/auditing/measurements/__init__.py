"""What an audit measures, one concept a file."""
