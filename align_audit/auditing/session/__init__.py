"""Policy and reference side by side over the probe pairs."""
