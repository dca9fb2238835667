"""Slow float64 reference for SLAO ("merge before forget"): Gram-Schmidt, recurrences and weights written out.

A (r, d_in) and B (d_out, r) are one layer's factors. Domains are counted from one, as in the paper.
"""

import math

import numpy as np


def restart(A):
    """Rows of A made orthonormal one after another, each keeping a positive part of its own row; and R, A^T = Q R."""
    rank = len(A)
    rows, R = np.zeros(A.shape), np.zeros((rank, rank))
    for i in range(rank):
        left = A[i].astype(float).copy()
        for _ in range(2):
            for j in range(i):
                part = float(rows[j] @ left)
                R[j, i] += part
                left = left - part * rows[j]
        R[i, i] = math.sqrt(float(left @ left))
        rows[i] = left / R[i, i]
    return rows, R


def rate(i, schedule="sqrt", constant=0.5):
    """lambda(i); the first domain's is 1 whatever the schedule."""
    if i == 1:
        return 1.0
    return {"sqrt": 1 / math.sqrt(i), "linear": 1 / i, "constant": constant}[schedule]


def merged(Bs, schedule="sqrt", constant=0.5):
    """B_mg after all of B_1 .. B_T."""
    found = Bs[0]
    for i, B in enumerate(Bs[1:], start=2):
        found = found + rate(i, schedule, constant) * (B - found)
    return found


def weights(count, schedule="sqrt", constant=0.5):
    """w_k = lambda(k) prod_{j > k} (1 - lambda(j)), k = 1 .. T."""
    found = []
    for k in range(1, count + 1):
        left = math.prod(1 - rate(j, schedule, constant) for j in range(k + 1, count + 1))
        found.append(rate(k, schedule, constant) * left)
    return found
