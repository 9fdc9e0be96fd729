"""What an audit says, as it is stored and read back."""
