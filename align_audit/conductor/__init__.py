"""The one conductor: opens both models, walks the probe pairs once, and turns what it gathered into a record."""
