"""Slow float64 reference for GainLoRA: gates, how one starts, what its updates may be, what is remembered.

Matrices are as the specification has them: G_1 (width, d), G_2 (d, width), key (d,); a memory M is (d, k), orthonormal.
"""

import math

import numpy as np

from tests.oracles.gpm import later_count
from tests.oracles.subspace import as_float64

COSINE_SCALE = 4.0


def silu(v):
    return np.array([x / (1.0 + math.exp(-x)) for x in v])


def layer_inputs(p0, g1, g2):
    """p_0, p_1 = silu(G_1 p_0), p_2 = silu(G_2 p_1) of one question."""
    p0, g1, g2 = as_float64(p0), as_float64(g1), as_float64(g2)
    p1 = silu([sum(g1[i, j] * p0[j] for j in range(len(p0))) for i in range(len(g1))])
    p2 = silu([sum(g2[i, j] * p1[j] for j in range(len(p1))) for i in range(len(g2))])
    return p0, p1, p2


def gate(p0, g1, g2, key, head):
    """a = |2 sigmoid(b) - 1|, b = key . p_2, or 4 times their cosine."""
    p2 = layer_inputs(p0, g1, g2)[2]
    b = sum(float(k) * float(p) for k, p in zip(as_float64(key), p2, strict=True))
    if head == "cosine":
        b = COSINE_SCALE * b / (np.linalg.norm(as_float64(key)) * np.linalg.norm(p2))
    return abs(2.0 / (1.0 + math.exp(-b)) - 1.0)


def gated_output(x, weight, branches, gates):
    """y = W x + sum_i a_i s_i B_i A_i x; branches are (A, B, s)."""
    y = as_float64(weight) @ as_float64(x)
    for (a, b, s), g in zip(branches, gates, strict=True):
        y = y + g * s * (as_float64(b) @ (as_float64(a) @ as_float64(x)))
    return y


def constrained(g, before, memory, row_renorm=False):
    """The change of every row since `before` without its part in the memory; rows then as long as they were."""
    g, before, memory = as_float64(g), as_float64(before), as_float64(memory)
    result = g.copy()
    for row in range(len(g)):
        change = g[row] - before[row]
        for column in range(memory.shape[1]):
            result[row] = result[row] - np.dot(change, memory[:, column]) * memory[:, column]
        if row_renorm:
            result[row] = result[row] * (np.linalg.norm(g[row]) / np.linalg.norm(result[row]))
    return result


def second_moment(rows):
    rows = as_float64(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row, row)
    return total


def start_key(old_key, memory, p2):
    """Top left singular vector of (I - M M^T) C, C the new domain's second moment of p_2; as long as the old key."""
    memory, moment = as_float64(memory), second_moment(p2)
    left = np.linalg.svd(moment - memory @ (memory.T @ moment))[0]
    return left[:, 0] * np.linalg.norm(as_float64(old_key))


def threshold(start, end, t, T):
    """eps_t = start + (end - start) t / T, t from 0."""
    return start + (end - start) * t / T


def remembered(memory, rows, eps, measure):
    """M <- [M, U_r] of gate inputs (n, d); `sigma4` decomposes their second moment in place of them."""
    memory, rows = as_float64(memory), as_float64(rows)
    matrix = second_moment(rows) if measure == "sigma4" else rows.T
    left = matrix - memory @ (memory.T @ matrix)
    directions, sigma, _ = np.linalg.svd(left)
    count = later_count(np.linalg.svd(matrix, compute_uv=False), sigma, eps)
    return np.concatenate([memory, directions[:, :count]], axis=1)
