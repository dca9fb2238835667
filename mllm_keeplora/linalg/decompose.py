"""Decompositions shared by the subspace functions: eigenvectors of a Gram, orthonormalisation, signs.

All in float64: a Gram squares the condition number, which float32 cannot afford. Knows no energy rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Directions whose singular value is below this share of the largest one are rounding noise, not signal.
NOISE_RATIO = 1e-6
# From this size on the vectors of a CPU's matrix are computed for the leading eigenvalues only.
LARGE = 512
# A unit vector whose part inside a basis is longer than this is refused as a new direction.
LEAK_TOLERANCE = 1e-5


def leading_eigenvectors(gram: Tensor, count: Callable[[Tensor], int]) -> Tensor:
    """Compute eigenvectors of a symmetric positive semi-definite matrix, largest eigenvalue first.

    Args:
        gram: (d, d) float64.
        count: receives the eigenvalues (d,), descending and clipped at 0, and says how many vectors to return.

    Returns:
        (d, m) float64, orthonormal columns, m = count(eigenvalues).
    """
    return _leading_eigenvectors((gram + gram.mT) / 2, count)


def leading_right_vectors(matrix: Tensor, count: Callable[[Tensor], int]) -> Tensor:
    """Compute leading right singular vectors, by the Gram matrix of the smaller side.

    Args:
        matrix: (n, d) float64.
        count: receives the squared singular values (min(n, d),), descending; must not ask for zero ones.

    Returns:
        (d, m) float64, orthonormal columns.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return _leading_eigenvectors(_lower_gram(matrix), count)
    left = _leading_eigenvectors(_lower_gram(matrix.mT), count)
    mapped = matrix.mT @ left
    mapped = mapped / mapped.norm(dim=0).clamp(min=torch.finfo(mapped.dtype).tiny)
    return signed_qr(mapped)[0]


def _leading_eigenvectors(lower: Tensor, count: Callable[[Tensor], int]) -> Tensor:
    """`leading_eigenvectors` of a matrix of which only the lower triangle is read."""
    if lower.device.type == "cpu" and lower.shape[0] >= LARGE:
        return _leading_by_tridiagonal(lower, count)
    eigenvalues, vectors = torch.linalg.eigh(lower)
    wanted = count(eigenvalues.flip(0).clamp(min=0.0))
    return vectors.flip(1)[:, :wanted]


def _leading_by_tridiagonal(lower: Tensor, count: Callable[[Tensor], int]) -> Tensor:
    """All eigenvalues from the tridiagonal form, then only those vectors that are asked for.

    LAPACK's syevr in two halves, with the decision between them: half the time of all vectors at a few hundred wanted.
    """
    from scipy.linalg import eigh_tridiagonal, lapack

    size = lower.shape[0]
    work = int(lapack.dsytrd_lwork(size, lower=1)[0])
    array = lower.numpy().copy("F")
    reflectors, diagonal, beside, factors, _ = lapack.dsytrd(array, lower=1, lwork=work, overwrite_a=1)
    eigenvalues, info = lapack.dsterf(diagonal, beside)
    if info:
        raise RuntimeError(f"LAPACK found no eigenvalues of a matrix of size {size} (dsterf: {info})")
    wanted = count(torch.from_numpy(eigenvalues[::-1].copy()).clamp(min=0.0))
    if wanted == 0:
        return lower.new_zeros(size, 0)
    _, vectors = eigh_tridiagonal(
        diagonal, beside, select="i", select_range=(size - wanted, size - 1), lapack_driver="stemr"
    )
    below, householder = vectors[1:].copy("F"), reflectors[1:, :-1]
    work = int(lapack.dormqr("L", "N", householder, factors, below, -1)[1][0])
    vectors[1:] = lapack.dormqr("L", "N", householder, factors, below, work)[0]
    return torch.from_numpy(vectors[:, ::-1].copy())


def _lower_gram(rows: Tensor) -> Tensor:
    """Lower triangle of rows^T rows for rows (n, d); what is above it is not defined."""
    if rows.device.type != "cpu" or rows.shape[1] < LARGE:
        return rows.mT @ rows
    from scipy.linalg import blas

    array = rows.numpy().T
    if array.flags.f_contiguous:
        return torch.from_numpy(blas.dsyrk(1.0, array, lower=1))
    return torch.from_numpy(blas.dsyrk(1.0, array.T, lower=1, trans=1))


def largest_singular_value(matrix: Tensor) -> float:
    """Bound the spectral norm from below by power iteration from the longest row: close enough for noise floors."""
    if matrix.numel() == 0:
        return 0.0
    vector, value = matrix[int(matrix.norm(dim=1).argmax())], 0.0
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
        candidates, remaining = signed_qr(candidates)
        candidates = candidates[:, remaining > 0.5]
    inside = (columns.mT @ candidates).norm(dim=0)
    return candidates[:, inside <= LEAK_TOLERANCE]


class Complement:
    """Give coordinates in the space orthogonal to given columns, by Householder reflections never multiplied out.

    A decomposition in them is smaller than one in the whole space, and its vectors are orthogonal to the columns.

    Args:
        columns: (d, k) float64, k <= d, independent.
    """

    def __init__(self, columns: Tensor) -> None:
        self._rank = columns.shape[1]
        self._reflections = torch.geqrf(columns)

    def coordinates(self, rows: Tensor) -> Tensor:
        """Map parts of rows (n, d) outside the columns to (n, d - k), of the same lengths and angles."""
        return (torch.ormqr(*self._reflections, rows, left=False) if self._rank else rows)[:, self._rank :]

    def lift(self, vectors: Tensor) -> Tensor:
        """Map coordinates (d - k, m) back to vectors (d, m)."""
        if not self._rank:
            return vectors
        padded = torch.cat([vectors.new_zeros(self._rank, vectors.shape[1]), vectors])
        return torch.ormqr(*self._reflections, padded)


def fix_signs(columns: Tensor) -> Tensor:
    """Flip each column so that its entry of largest magnitude is positive; (d, m) in and out."""
    if columns.numel() == 0:
        return columns
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return columns * torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def signed_qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR whose R has a non-negative diagonal: Q stays near the input; also returns that diagonal."""
    q, r = torch.linalg.qr(columns)
    diagonal = r.diagonal()
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype), diagonal.abs()
