"""Slow float64 reference for OWM: recursive least squares over inputs one by one, and the steps it allows.

Inputs are rows x (n, d_in), A is (r, d_in), P (d_in, d_in).
"""

import numpy as np


def projection(domains, ridge):
    """P after the inputs of domains, each a list of rows: P <- P - P x x^T P / (a + x^T P x), from P = I.

    a is `ridge` times the mean over dimensions of the domain's summed squares.
    """
    P = np.eye(np.asarray(domains[0]).shape[1])
    for rows in domains:
        rows = np.asarray(rows, dtype=np.float64)
        a = ridge * (rows**2).sum() / rows.shape[1]
        for x in rows:
            Px = P @ x
            P = P - np.outer(Px, Px) / (a + x @ Px)
    return P


def opened(A, P):
    """A P, each row as long as it was."""
    A = np.asarray(A, dtype=np.float64)
    out = A @ P
    for row, start in zip(out, A, strict=True):
        row *= np.sqrt((start**2).sum() / (row**2).sum())
    return out


def step(A, gradient, lr, P):
    """Gradient descent along G P, the published rule; a step whose change is multiplied by P ends there as well."""
    return np.asarray(A, dtype=np.float64) - lr * np.asarray(gradient, dtype=np.float64) @ P
