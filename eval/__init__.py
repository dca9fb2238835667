"""The evaluation harness: it asks, grades, fills the score matrix, and meets training in the run directory only."""
