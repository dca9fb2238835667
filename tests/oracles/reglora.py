"""Slow float64 reference for RegLoRA, written from the equations alone.

A is (r, d_in) and B is (d_out, r), as peft has them; a mark is a pair (i, j), and `marks` lists the pairs of each
finished domain.
"""

from fractions import Fraction
from math import floor

import numpy as np


def product(A, B):
    """(B A)_ij, without the scale."""
    A, B = (np.asarray(each, dtype=np.float64) for each in (A, B))
    out = np.zeros((len(B), A.shape[1]))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = sum(B[i, k] * A[k, j] for k in range(len(A)))
    return out


def largest(A, B, share="0.02"):
    """The floor(share d_out d_in) pairs with the largest |(B A)_ij|, as a set."""
    delta = product(A, B)
    pairs = [(i, j) for i in range(delta.shape[0]) for j in range(delta.shape[1])]
    pairs.sort(key=lambda pair: -abs(delta[pair]))
    return set(pairs[: floor(Fraction(share) * delta.size)])


def weights(marks, shape, overlap="union"):
    """How often each entry counts: once if any domain marked it (union), or once for each that did (multiset)."""
    counts = np.zeros(shape)
    for domain in marks:
        for pair in domain:
            counts[pair] += 1
    return np.minimum(counts, 1) if overlap == "union" else counts


def mean_of_marked(A, B, counts):
    """Mean over the marked entries of |(B A)_ij|, one layer."""
    return float((counts * np.abs(product(A, B))).sum() / counts.sum())


def gradients(A, B, counts):
    """Derivatives of `mean_of_marked` with respect to A and B, entry by entry; the sign of 0 is 0."""
    A, B = (np.asarray(each, dtype=np.float64) for each in (A, B))
    delta, dA, dB = product(A, B), np.zeros_like(A), np.zeros_like(B)
    for i in range(delta.shape[0]):
        for j in range(delta.shape[1]):
            pull = counts[i, j] * np.sign(delta[i, j]) / counts.sum()
            for k in range(len(A)):
                dB[i, k] += pull * A[k, j]
                dA[k, j] += pull * B[i, k]
    return dA, dB


def penalty(A, B, counts, strength):
    """strength / N times the sum over N layers; A, B and counts by layer."""
    return strength / len(A) * sum(mean_of_marked(A[layer], B[layer], counts[layer]) for layer in A)
