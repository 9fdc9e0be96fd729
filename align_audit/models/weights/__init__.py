"""Where weights are, and what they hash to."""
