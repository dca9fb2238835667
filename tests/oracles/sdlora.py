"""Slow float64 reference for SD-LoRA: directions, magnitudes and the fit that drops a direction, with whole matrices.

A branch is a dictionary layer -> (A, B, s): A (r, d_in), B (d_out, r), and the scale s of peft; D = s B A.
"""

import math

import numpy as np


def product(branch, layer):
    """D = s B A, (d_out, d_in), entry by entry."""
    A, B, s = branch[layer]
    A, B = np.asarray(A, dtype=np.float64), np.asarray(B, dtype=np.float64)
    found = np.zeros((B.shape[0], A.shape[1]))
    for i in range(B.shape[0]):
        for j in range(A.shape[1]):
            found[i, j] = s * sum(B[i, k] * A[k, j] for k in range(A.shape[0]))
    return found


def frobenius(matrix):
    """||M||_F from the sum of all squares."""
    return math.sqrt(sum(float(value) ** 2 for value in np.asarray(matrix, dtype=np.float64).ravel()))


def direction(branch, layer):
    """Dbar = B A / ||B A||_F."""
    found = product(branch, layer)
    return found / frobenius(found)


def official_direction(branch, layer):
    """B A / (||B||_F ||A||_F), the normaliser of the published code."""
    A, B, s = branch[layer]
    return product(branch, layer) / (s * frobenius(A) * frobenius(B))


def update(layer, directions, magnitudes):
    """Sum over i of magnitude_i times direction_i of one layer."""
    return sum(alpha * each[layer] for alpha, each in zip(magnitudes, directions, strict=True))


def fit(directions, target):
    """Least squares of one direction on others, all layers as one long vector.

    Args:
        directions: list of dictionaries layer -> matrix.
        target: dictionary layer -> matrix.

    Returns:
        Coefficients, and the squared residual as a share of the target's squared norm.
    """
    layers = list(target)
    columns = [np.concatenate([each[layer].ravel() for layer in layers]) for each in directions]
    wanted = np.concatenate([target[layer].ravel() for layer in layers])
    matrix = np.stack(columns, axis=1)
    coefficients = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    left = wanted - matrix @ coefficients
    return coefficients, float(left @ left) / float(wanted @ wanted)
