"""Slow float64 reference for GPM: the memory of input directions, and the rules that keep a branch outside of it.

Features are rows (n, d_in), A is (r, d_in), the memory M orthonormal columns (d_in, k).
"""

import numpy as np

from tests.oracles.subspace import as_float64, energy, gram_schmidt


def threshold(start, end, t, T):
    """eps_t = start + (end - start) t / T, t from 0."""
    return start + (end - start) * t / T


def outside(rows, memory):
    """Rows without their part along each remembered direction, one direction after the other, twice."""
    rows, memory = as_float64(rows), as_float64(memory)
    for _ in range(2):
        for i in range(memory.shape[1]):
            for j in range(rows.shape[0]):
                rows[j] = rows[j] - np.dot(rows[j], memory[:, i]) * memory[:, i]
    return rows


def first_count(sigma, eps, published=False):
    """First task: smallest k whose leading sigma^2 hold a share eps; as published, the shares below eps are counted.

    The published count is at least 1, as in InfLoRA's code.
    """
    shares = [float(s) ** 2 / sum(float(v) ** 2 for v in sigma) for s in sigma]
    reached, k = 0.0, 0
    while reached < eps and k < len(shares):
        reached += shares[k]
        k += 1
    if published:
        below = sum(1 for i in range(len(shares)) if sum(shares[: i + 1]) < eps)
        return max(below, 1)
    return k


def later_count(sigma_total, sigma_left, eps):
    """Later tasks: smallest r with (||X||^2 - ||X'||^2 + the r leading sigma_left^2) / ||X||^2 >= eps."""
    total, left = (sum(float(s) ** 2 for s in values) for values in (sigma_total, sigma_left))
    share, r = (total - left) / total, 0
    while share < eps and r < len(sigma_left):
        share += float(sigma_left[r]) ** 2 / total
        r += 1
    return r


def grow(memory, features, eps, published=False):
    """M <- [M, U_r] for stacked features X (n, d_in), at most d_in columns in all."""
    features, memory = as_float64(features), as_float64(memory)
    d_in, k = memory.shape
    left = outside(features, memory)
    sigma_total = np.linalg.svd(features, compute_uv=False)
    _, sigma_left, right = np.linalg.svd(left, full_matrices=False)
    r = first_count(sigma_total, eps, published) if k == 0 else later_count(sigma_total, sigma_left, eps)
    r = min(r, d_in - k)
    return np.concatenate([memory, gram_schmidt(right[:r].T, memory)], axis=1)


def coverage(memory, features):
    """Share of the energy of features that lies in the memory."""
    total = energy(features)
    return (total - energy(outside(features, memory))) / total


def opened_a(a, memory):
    """A <- A P, each row as long as it was."""
    a = as_float64(a)
    projected = outside(a, memory)
    for j in range(a.shape[0]):
        projected[j] = projected[j] * (np.linalg.norm(a[j]) / np.linalg.norm(projected[j]))
    return projected


def sgd_with_projected_gradient(a, gradient, lr, memory):
    """Mode `grad` with plain gradient descent: A - lr (G - G M M^T)."""
    return as_float64(a) - lr * outside(gradient, memory)


def sgd_then_projection(a, gradient, lr, memory):
    """Mode `post` with plain gradient descent: the step first, then A - (A M) M^T."""
    return outside(as_float64(a) - lr * as_float64(gradient), memory)
