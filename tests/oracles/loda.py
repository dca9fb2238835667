"""Slow float64 reference for LoDA: energies, the generalised eigenproblem and the recalibration by normal equations.

S (d, d) are second moments of a layer's inputs, U (d, r) columns, A (r, d) rows, B (d_out, r).
"""

import numpy as np


def energy(U, S):
    """tr(U^T S U), one column after another."""
    return float(sum(column @ S @ column for column in U.T))


def general(old, new, rank):
    """The r leading eigenvectors of S_old + S_new, as columns."""
    values, vectors = np.linalg.eigh(old + new)
    return vectors[:, np.argsort(-values)[:rank]]


def isolated(old, new, rank, ridge):
    """U with S_new u = mu (S_old + ridge I) u for the r largest mu, U^T (S_old + ridge I) U = I; and mu.

    By the unsymmetric problem (S_old + ridge I)^-1 S_new, not by a Cholesky factor.
    """
    damped = old + ridge * np.eye(len(old))
    values, vectors = np.linalg.eig(np.linalg.inv(damped) @ new)
    order = np.argsort(-values.real)[:rank]
    U = vectors[:, order].real
    U = U / np.sqrt(np.einsum("ik,ij,jk->k", U, damped, U))
    return U, values.real[order]


def error(B, A, weights, old, new, gamma):
    """J(Lambda) = tr(B L A S_old A^T L^T B^T) + gamma tr(B (L - I) A S_new A^T (L - I)^T B^T)."""
    kept, lost = B @ weights @ A, B @ (weights - np.eye(len(A))) @ A
    return float(np.trace(kept @ old @ kept.T) + gamma * np.trace(lost @ new @ lost.T))


def recalibrated(A, old, new, gamma):
    """The full minimiser: L (G_old + gamma G_new) = gamma G_new, solved row by row as linear equations."""
    G_old, G_new = A @ old @ A.T, A @ new @ A.T
    system = (G_old + gamma * G_new).T
    return np.stack([np.linalg.solve(system, row) for row in gamma * G_new])


def recalibrated_diagonally(A, old, new, gamma):
    """lambda_i = gamma g_new / (g_old + gamma g_new), one row of A at a time."""
    found = []
    for row in A:
        g_old, g_new = max(0.0, float(row @ old @ row)), max(0.0, float(row @ new @ row))
        found.append(gamma * g_new / (g_old + gamma * g_new))
    return np.array(found)


def aligned(theta, gradient, counts, rho):
    """One step's gradient: that of either half where a step of length rho down the other half's, per tensor, leads.

    theta: tensors by name; gradient(half, theta): of the half's mean loss over its tokens, of which counts[half] are.
    """
    total = {name: np.zeros(values.shape) for name, values in theta.items()}
    for half, other in ((1, 0), (0, 1)):
        slope = gradient(other, theta)
        ahead = {}
        for name, values in theta.items():
            ahead[name] = values - rho * slope[name] / (np.sqrt((slope[name] ** 2).sum()) + 1e-12)
        for name, values in gradient(half, ahead).items():
            total[name] += counts[half] / sum(counts) * values
    return total
