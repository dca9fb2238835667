"""Checkpoints that need none of this code."""
