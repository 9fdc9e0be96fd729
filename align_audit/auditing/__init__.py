"""One audit: both models over the probe pairs, and what is measured of them."""
