"""Renders the results of runs for a terminal, a figure or a page. Reads results dicts; opens no run and no model."""
