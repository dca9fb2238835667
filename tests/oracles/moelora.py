"""A dense mixture of low-rank experts in float64, one token and one expert at a time. CoIN (arXiv 2403.08350)."""

from __future__ import annotations

import numpy as np


def gates(x: np.ndarray, router: np.ndarray) -> np.ndarray:
    """Softmax of a router's logits for one token: x (d_in,), router (experts, d_in) -> (experts,)."""
    logits = np.array([sum(row[i] * x[i] for i in range(len(x))) for row in router])
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def mixture(x: np.ndarray, A: np.ndarray, B: np.ndarray, router: np.ndarray, alpha: float) -> np.ndarray:
    """What the experts add to a layer's outputs.

    Args:
        x: (n, d_in) tokens.
        A, B: (rank, d_in) and (d_out, rank) of all experts; expert e has the e-th run of rank / experts coordinates.
        router: (experts, d_in).
        alpha: the scale is alpha / rank, with the rank of all experts together.

    Returns:
        (n, d_out): sum over experts of gate_e(x) * alpha / rank * B_e A_e x.
    """
    rank, experts = A.shape[0], router.shape[0]
    size = rank // experts
    added = np.zeros((x.shape[0], B.shape[0]))
    for token in range(x.shape[0]):
        weights = gates(x[token], router)
        for expert in range(experts):
            own = slice(expert * size, (expert + 1) * size)
            added[token] += weights[expert] * alpha / rank * (B[:, own] @ (A[own] @ x[token]))
    return added
