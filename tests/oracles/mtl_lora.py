"""Slow float64 reference of MTL-LoRA (arXiv 2410.09437): a transform for each task, a softmax over up-projections.

A (r, d_in), Bs a list of (d_out, r), transform (r, r) or its diagonal (r,), logits (n,) of one task and layer.
"""

import math

import numpy as np


def shares(logits, temperature):
    """softmax(w / tau), the largest taken off first."""
    scaled = [float(each) / temperature for each in logits]
    powers = [math.exp(each - max(scaled)) for each in scaled]
    return [each / sum(powers) for each in powers]


def added(x, A, transform, Bs, logits, temperature, alpha):
    """What a layer adds for one token x (d_in,): s sum_i p_i B^i (Lambda (A x))."""
    rank = len(A)
    low = [sum(float(a) * float(each) for a, each in zip(row, x, strict=True)) for row in A]
    matrix = np.diag(transform) if np.ndim(transform) == 1 else np.asarray(transform)
    turned = [sum(float(matrix[i][j]) * low[j] for j in range(rank)) for i in range(rank)]
    found = np.zeros(len(Bs[0]))
    for share, B in zip(shares(logits, temperature), Bs, strict=True):
        for out in range(len(found)):
            found[out] += share * sum(float(B[out][i]) * turned[i] for i in range(rank))
    return alpha / rank * found


def numbers(d_in, d_out, rank, tasks, ups):
    """How many numbers a layer has: r d_in + T r^2 + n d_out r + T n."""
    return rank * d_in + tasks * rank**2 + ups * d_out * rank + tasks * ups
