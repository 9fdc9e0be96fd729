"""Models built to mislead, with the right answer computed beside the audit; written from METHODS, not from the code."""
