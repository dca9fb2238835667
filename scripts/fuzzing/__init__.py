"""Mutated inputs for every reader: what is changed, what is read, and in which process."""
