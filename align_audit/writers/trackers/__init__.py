"""Experiment trackers: W&B, MLflow and Trackio, through the run that the trainer reports to."""
