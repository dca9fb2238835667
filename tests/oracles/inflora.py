"""Slow float64 reference for InfLoRA: the start of A, and DualGPM with its two ways of storing one subspace.

Features are rows (n, d_in), A is (r, d_in); M holds protected directions, M_perp free ones, orthonormal columns both.
"""

import numpy as np

from tests.oracles.subspace import as_float64, empty_basis


def threshold(eps, t, T):
    """eps_t = eps + (1 - eps) t / T, t from 0."""
    return eps + (1.0 - eps) * t / T


def second_moment(features):
    """C = sum of x x^T / n over the rows, (d_in, d_in)."""
    features = as_float64(features)
    total = np.zeros((features.shape[1], features.shape[1]))
    for x in features:
        total = total + np.outer(x, x)
    return total / features.shape[0]


def seen(features, measure):
    """The matrix (d_in, any) whose squared singular values count as energy: X for sigma2, C itself for sigma4."""
    return as_float64(features).T if measure == "sigma2" else second_moment(features)


def remove(matrix, memory):
    """X' = X - M M^T X for columns X."""
    return matrix - memory @ (memory.T @ matrix)


def retain(matrix, free):
    """X' = M_perp M_perp^T X for columns X."""
    return free @ (free.T @ matrix)


def initial_a(left, rank, c):
    """A = c U_r^T of what is left, U S V^T = svd(X')."""
    directions = np.linalg.svd(left)[0]
    return c * directions[:, :rank].T


def squares(matrix):
    return [float(s) ** 2 for s in np.linalg.svd(matrix, compute_uv=False)]


class Dual:
    """DualGPM: M while it has at most d_in / 2 columns, M_perp from then on.

    The first task stores the right side of the two from the start, where the published code mixes them up.
    """

    def __init__(self, d_in):
        self.mode, self.stored = "remove", empty_basis(d_in)
        self.is_first = True

    @property
    def free(self):
        """Columns of the free directions, whatever is stored."""
        if self.mode == "retain":
            return self.stored
        return np.linalg.svd(self.stored, full_matrices=True)[0][:, self.stored.shape[1] :]

    def left_of(self, matrix):
        return remove(matrix, self.stored) if self.mode == "remove" else retain(matrix, self.stored)

    def update(self, features, eps, measure, published=False):
        matrix = seen(features, measure)
        if self.mode == "remove":
            self._grow(matrix, eps, published and self.is_first)
        else:
            self._shrink(matrix, eps)
        self.is_first = False
        d_in, columns = self.stored.shape
        if self.mode == "remove" and columns > d_in / 2:
            self.stored, self.mode = self.free, "retain"

    def _grow(self, matrix, eps, one_fewer):
        left = remove(matrix, self.stored)
        total, energies = sum(squares(matrix)), squares(left)
        share, r = (total - sum(energies)) / total, 0
        while share < eps and r < len(energies):
            share += energies[r] / total
            r += 1
        if one_fewer:
            r = max(sum(1 for i in range(len(energies)) if sum(energies[: i + 1]) / total < eps), 1)
        r = min(r, self.stored.shape[0] - self.stored.shape[1])
        directions = np.linalg.svd(left)[0][:, :r]
        self.stored = np.linalg.qr(np.concatenate([self.stored, directions], axis=1))[0]

    def _shrink(self, matrix, eps):
        """Take out the fewest top directions that bring the energy share inside M_perp to at most 1 - eps."""
        left = retain(matrix, self.stored)
        total, energies = sum(squares(matrix)), squares(left)
        share, r = sum(energies) / total, 0
        while share > 1.0 - eps and r < self.stored.shape[1]:
            share -= energies[r] / total
            r += 1
        directions = np.linalg.svd(left)[0][:, :r]
        smaller = self.stored - directions @ (directions.T @ self.stored)
        self.stored = np.linalg.svd(smaller)[0][:, : self.stored.shape[1] - r]


def step_of_weight(gradient, a, scale, lr):
    """One gradient descent step on B from B = 0 moves the weight by -lr s^2 G A^T A."""
    gradient, a = as_float64(gradient), as_float64(a)
    return -lr * scale**2 * (gradient @ a.T @ a)
