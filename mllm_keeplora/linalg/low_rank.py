"""Norms, inner products and fits of low-rank products B A, none of which is ever formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import as_matrix, full_precision


def gram_of_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the inner products of matrices that are given as B A.

    Args:
        pairs: (B, A) with B (d_out, r) and A (r, d_in); the rank r may differ from pair to pair.

    Returns:
        (n, n) float64: <B_i A_i, B_j A_j>_F = trace((B_i^T B_j)(A_j A_i^T)); norms are the roots of its diagonal.

    Raises:
        ValueError: no pair, sizes that do not fit, or a value that is not finite.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one product, got none")
    d_out, d_in = pairs[0][0].shape[0], pairs[0][1].shape[1]
    As = [as_matrix(A, "A", columns=d_in).double() for _, A in pairs]
    Bs = [as_matrix(B, "B", columns=A.shape[0], rows=d_out).double() for (B, _), A in zip(pairs, As, strict=True)]
    ranks = torch.tensor([A.shape[0] for A in As])
    member = torch.nn.functional.one_hot(torch.arange(len(pairs)).repeat_interleave(ranks), len(pairs))
    A, B = torch.cat(As), torch.cat(Bs, dim=1)
    member = member.to(A)
    with full_precision(A.device):
        return member.mT @ ((B.mT @ B) * (A @ A.mT)) @ member


def fit_last(gram: Tensor) -> tuple[Tensor, float]:
    """Combine all but the last of some vectors to come nearest to the last.

    Args:
        gram: (n, n) float64, their inner products; n at least 2. Vectors may be zero, or depend on each other.

    Returns:
        (n - 1,) float64 coefficients, the smallest where several are as good; and the squared distance that is left,
        as a share of the last vector's squared length (0 for a zero vector).

    Raises:
        ValueError: not square, fewer than two vectors, or a value that is not finite.
    """
    gram = as_matrix(gram, "gram", columns=gram.shape[0]).double()
    if len(gram) < 2:
        raise ValueError(f"gram must be of at least two vectors, got {len(gram)}")
    inner, target, energy = gram[:-1, :-1], gram[:-1, -1], float(gram[-1, -1])
    coefficients = torch.linalg.pinv(inner, hermitian=True) @ target
    left = energy - float(coefficients @ target)
    return coefficients, max(left, 0.0) / energy if energy > 0.0 else 0.0
