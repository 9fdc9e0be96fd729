"""The claims of two papers on where preference training acts, on real DPO runs: as stated, and as controls allow them."""
