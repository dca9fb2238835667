"""Slow float64 reference for merging task vectors: every rule entry by entry, with whole matrices.

A task vector is a matrix Delta (d_out, d_in) of what one domain's training added to a weight W, y = x W^T.
"""

import numpy as np


def summed(deltas, scale):
    """scale * sum_t Delta_t."""
    found = np.zeros(deltas[0].shape)
    for i, j in np.ndindex(*found.shape):
        found[i, j] = scale * sum(float(delta[i, j]) for delta in deltas)
    return found


def trimmed(delta, density):
    """The share `density` of largest entries by magnitude (at least one), the others zero."""
    places = sorted(np.ndindex(*delta.shape), key=lambda place: -abs(float(delta[place])))
    found = np.zeros(delta.shape)
    for place in places[: max(1, int(density * delta.size))]:
        found[place] = delta[place]
    return found


def elected(deltas):
    """Of each entry the sign of the sum over tasks (+ where it is 0), and the mean of those entries that have it."""
    found = np.zeros(deltas[0].shape)
    for place in np.ndindex(*found.shape):
        values = [float(delta[place]) for delta in deltas]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [value for value in values if value * sign > 0]
        found[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return found


def ties(deltas, density, scale=1.0):
    """Trim, elect, merge."""
    return scale * elected([trimmed(delta, density) for delta in deltas])


def dropped(delta, kept, rate):
    """Entries that a mask keeps, divided by the share that is kept on average."""
    found = np.zeros(delta.shape)
    for place in np.ndindex(*found.shape):
        found[place] = float(delta[place]) / (1 - rate) if kept[place] else 0.0
    return found


def damped(moments, off_diagonal):
    """G with all but its diagonal multiplied by `off_diagonal`."""
    found = np.array(moments, dtype=np.float64)
    for i, j in np.ndindex(*found.shape):
        if i != j:
            found[i, j] *= off_diagonal
    return found


def regmean(weights, inputs, off_diagonal):
    """W = argmin sum_t ||X_t W^T - X_t W_t^T||^2 / n_t by its normal equations, moments damped.

    Args:
        weights: W_t (d_out, d_in).
        inputs: X_t (n_t, d_in), rows.
    """
    moments = [damped(X.T @ X / len(X), off_diagonal) for X in inputs]
    right = sum(G @ W.T for G, W in zip(moments, weights, strict=True))
    return np.linalg.solve(sum(moments), right).T


def nearest(delta, rank):
    """The nearest matrix of a rank, and the share of squared entries that is lost."""
    U, S, V = np.linalg.svd(delta)
    found = sum((S[k] * np.outer(U[:, k], V[k]) for k in range(min(rank, len(S)))), np.zeros(delta.shape))
    return found, float(((delta - found) ** 2).sum() / (delta**2).sum())
