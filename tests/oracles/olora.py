"""Slow float64 reference for the penalties of O-LoRA, written from the equations alone.

A is (r, d_in) and B is (d_out, r), as peft has them; `past` lists the A of one layer over the earlier domains.
"""

import math

import numpy as np


def overlap(past, A, kind="l1"):
    """Sum over i, j, k of |(A_i A^T)_jk| (l1), or of its square (l2sq), for one layer."""
    A = np.asarray(A, dtype=np.float64)
    total = 0.0
    for A_i in past:
        for old in np.asarray(A_i, dtype=np.float64):
            for new in A:
                product = sum(a * b for a, b in zip(old, new, strict=True))
                total += abs(product) if kind == "l1" else product**2
    return total


def overlap_gradient(past, A, kind="l1"):
    """Derivative of `overlap` with respect to A, (r, d_in): row k collects sign(p) A_i[j], or 2 p A_i[j]."""
    A = np.asarray(A, dtype=np.float64)
    gradient = np.zeros_like(A)
    for A_i in past:
        for old in np.asarray(A_i, dtype=np.float64):
            for k, new in enumerate(A):
                product = float(np.dot(old, new))
                gradient[k] += (np.sign(product) if kind == "l1" else 2 * product) * old
    return gradient


def norms(A, B):
    """||A||_F + ||B||_F of one layer."""
    return sum(math.sqrt(sum(float(value) ** 2 for value in np.asarray(each).ravel())) for each in (A, B))


def penalty(past, A, B, lambda1, lambda2=0.0, kind="l1"):
    """lambda1 * overlaps + lambda2 * norms, summed over layers.

    Args:
        past: per earlier domain a dictionary layer -> A.
        A, B: layer -> factor of the domain being learnt.
    """
    total = 0.0
    for layer in A:
        total += lambda1 * overlap([each[layer] for each in past], A[layer], kind)
        total += lambda2 * norms(A[layer], B[layer])
    return total
