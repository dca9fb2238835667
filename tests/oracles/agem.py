"""Slow float64 reference of A-GEM (Chaudhry et al. 2019, arXiv 1812.00420) over parameters by name."""

import numpy as np


def flat(gradients):
    """All gradients as one vector, in the order of their names."""
    return np.concatenate([np.asarray(gradients[name], dtype=np.float64).ravel() for name in sorted(gradients)])


def inner(one, other):
    """Inner product of two vectors, entry by entry."""
    total = 0.0
    for first, second in zip(flat(one), flat(other), strict=True):
        total += first * second
    return total


def projected(gradients, reference):
    """The vector nearest to g whose inner product with the reference is not negative.

    Least ||g' - g||^2 / 2 under g'.ref >= 0: g itself where that holds, else g - (g.ref / ref.ref) ref.
    """
    product = inner(gradients, reference)
    if product >= 0:
        return {name: np.asarray(values, dtype=np.float64) for name, values in gradients.items()}
    share = product / inner(reference, reference)
    return {
        name: np.asarray(values, dtype=np.float64) - share * np.asarray(reference[name], dtype=np.float64)
        for name, values in gradients.items()
    }
