"""Where inputs have energy: orthonormal restarts, subspaces of second moments, and shares between old and new ones.

Second moments S = X^T X / n are of a layer's inputs, (d_in, d_in); a down-projection A has rows in that space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import as_count, as_matrix, full_precision
from .decompose import signed_qr

GROWTH = 10.0  # of the ridge, until the Cholesky factor exists


def orthonormal_rows(A: Tensor) -> tuple[Tensor, Tensor]:
    """Make rows orthonormal by a reduced QR of the transpose, each near its own row.

    Args:
        A: (r, d_in), r <= d_in, any floating dtype.

    Returns:
        (r, d_in) Q^T and (r, r) R with A^T = Q R, the diagonal of R not negative; float32, or float64 for float64.

    Raises:
        ValueError: more rows than columns, or a value is not finite.
    """
    rows = as_matrix(A, "A")
    if len(rows) > rows.shape[1]:
        raise ValueError(f"A must have at most as many rows as columns, got shape {tuple(rows.shape)}")
    with full_precision(rows.device):
        Q, _ = signed_qr(rows.mT)
        return Q.mT.contiguous(), Q.mT @ rows.mT


def general_directions(moments: Tensor, rank: int) -> Tensor:
    """Give the leading eigenvectors of second moments as columns (d_in, r), those of most energy."""
    exact = _symmetric(moments, "moments")
    as_count(rank, "rank", 1)
    with full_precision(exact.device):
        return torch.linalg.eigh(exact)[1].flip(-1)[:, :rank]


def isolated_directions(old: Tensor, new: Tensor, rank: int, ridge: float = 1e-6) -> tuple[Tensor, Tensor, float]:
    """Give directions of much energy in new inputs for each bit of it in old ones.

    Args:
        old, new: second moments (d_in, d_in).
        rank: number of directions.
        ridge: first tried, relative to the mean diagonal of `old`; tenfold until the factorisation succeeds.

    Returns:
        (d_in, r) U with new U = (old + eps I) U diag(mu) and U^T (old + eps I) U = I, largest mu first; mu (r,); eps.
        All float64.

    Source: LoDA (arXiv 2603.00191) and its code: the Cholesky route, which maximises tr(U^T new U) under that
        constraint and is not the exact optimum of the ratio of traces over orthonormal U. There the ridge is absolute.
    """
    old, new = _symmetric(old, "old"), _symmetric(new, "new")
    as_count(rank, "rank", 1)
    with full_precision(old.device):
        # Moments that are zero throughout still need a ridge that can grow.
        eps = ridge * (float(old.diagonal().mean()) or 1.0)
        identity = torch.eye(len(old), dtype=old.dtype, device=old.device)
        while True:
            L, failed = torch.linalg.cholesky_ex(old + eps * identity)
            if not failed:
                break
            eps *= GROWTH
        whitened = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, new, upper=False).mT, upper=False)
        values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
        leading = vectors.flip(-1)[:, :rank]
        return torch.linalg.solve_triangular(L.mT, leading, upper=True), values.flip(-1)[:rank], eps


def recalibration(A: Tensor, old: Tensor, new: Tensor, gamma: float, full: bool = False) -> Tensor:
    """Give how much of a trained change to keep, by its directions' energy in old and in new inputs.

    Args:
        A: (r, d_in).
        old, new: second moments (d_in, d_in).
        gamma: how much the new inputs count.
        full: solve for a whole matrix instead of a diagonal.

    Returns:
        (r, r) float64 Lambda, which minimises ||B Lambda A X_old^T||^2 + gamma ||B (Lambda - I) A X_new^T||^2 for every
        B: gamma G_new (G_old + gamma G_new)^+ with G = A S A^T; or its form for the diagonals of G alone. A direction
        without energy in either stays as it was trained.

    Source: LoDA (arXiv 2603.00191); its code has the diagonal form.
    """
    rows = as_matrix(A, "A").double()
    with full_precision(rows.device):
        G_old, G_new = (rows @ _symmetric(S, name).to(rows) @ rows.mT for S, name in ((old, "old"), (new, "new")))
        if full:
            return gamma * G_new @ torch.linalg.pinv(G_old + gamma * G_new, hermitian=True)
        g_old, g_new = (G.diagonal().clamp(min=0.0) for G in (G_old, gamma * G_new))
        whole = g_old + g_new
        return torch.where(whole > 0, g_new / whole.clamp(min=torch.finfo(whole.dtype).tiny), 1.0).diag()


def _symmetric(moments: Tensor, name: str) -> Tensor:
    exact = as_matrix(moments, name).double()
    if exact.shape[0] != exact.shape[1]:
        raise ValueError(f"{name} must be square, got shape {tuple(exact.shape)}")
    return (exact + exact.mT) / 2
