"""The evaluation harness: asks a model, grades its answers, fills the score matrix.

It meets training in the run directory only.
"""
