"""Decompositions shared by the subspace functions: eigenvectors of a Gram, orthonormalisation, signs.

All in float64: a Gram squares the condition number, which float32 cannot afford. Knows no energy rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Directions whose singular value is below this share of the largest one are rounding noise, not signal.
NOISE_RATIO = 1e-6
# A unit vector whose part inside a basis is longer than this is refused as a new direction.
LEAK_TOLERANCE = 1e-5


def leading_eigenvectors(gram: Tensor, count: Callable[[Tensor], int]) -> Tensor:
    """Eigenvectors of a symmetric positive semi-definite matrix, largest eigenvalue first.

    Args:
        gram: (d, d) float64.
        count: receives the eigenvalues (d,), descending and clipped at 0, and says how many vectors to return.

    Returns:
        (d, m) float64, orthonormal columns, m = count(eigenvalues).
    """
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    wanted = count(eigenvalues.flip(0).clamp(min=0.0))
    return vectors.flip(1)[:, :wanted]


def leading_right_vectors(matrix: Tensor, count: Callable[[Tensor], int]) -> Tensor:
    """Leading right singular vectors, by the Gram matrix of the smaller side.

    Args:
        matrix: (n, d) float64.
        count: receives the squared singular values (min(n, d),), descending; must not ask for zero ones.

    Returns:
        (d, m) float64, orthonormal columns.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return leading_eigenvectors(matrix.mT @ matrix, count)
    left = leading_eigenvectors(matrix @ matrix.mT, count)
    mapped = matrix.mT @ left
    mapped = mapped / mapped.norm(dim=0).clamp(min=torch.finfo(mapped.dtype).tiny)
    return _signed_qr(mapped)[0]


def largest_singular_value(matrix: Tensor) -> float:
    """Spectral norm by power iteration from the longest row; a lower bound, close enough for noise floors."""
    if matrix.numel() == 0:
        return 0.0
    lengths = matrix.norm(dim=1)
    vector = matrix[int(lengths.argmax())]
    value = 0.0
    for _ in range(16):
        length = float(vector.norm())
        if length == 0.0:
            return value
        image = matrix @ (vector / length)
        value = max(value, float(image.norm()))
        vector = matrix.mT @ image
    return value


def orthonormal_complement(candidates: Tensor, columns: Tensor) -> Tensor:
    """Make near-orthonormal candidates orthonormal and orthogonal to a basis; drop those that lie inside it.

    Args:
        candidates: (d, m) float64, m may be 0.
        columns: (d, k) float64, orthonormal, k may be 0.

    Returns:
        (d, m') float64, m' <= m, in the order given, each with a part inside the basis below `LEAK_TOLERANCE`.
    """
    for _ in range(2):
        if candidates.shape[1] == 0:
            return candidates
        candidates = candidates - columns @ (columns.mT @ candidates)
        candidates, remaining = _signed_qr(candidates)
        candidates = candidates[:, remaining > 0.5]
    inside = (columns.mT @ candidates).norm(dim=0)
    return candidates[:, inside <= LEAK_TOLERANCE]


def fix_signs(columns: Tensor) -> Tensor:
    """Flip each column so that its entry of largest magnitude is positive; (d, m) in and out."""
    if columns.numel() == 0:
        return columns
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return columns * torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def _signed_qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR whose R has a non-negative diagonal: Q stays near the input; also returns that diagonal."""
    q, r = torch.linalg.qr(columns)
    diagonal = r.diagonal()
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype), diagonal.abs()
