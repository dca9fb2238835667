"""Fit one domain and everything around it: data passes for the strategy, checkpoints, factors on disk."""
