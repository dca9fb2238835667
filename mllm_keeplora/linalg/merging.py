"""Merge task vectors: what trainings from one start added to a weight, become one addition to it.

Each rule looks at one layer, or at one parameter of any shape. Source of each is named there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import as_matrix
from .decompose import NOISE_RATIO, leading_right_vectors

RIDGE = 1e-9  # of the mean diagonal: inputs that never were leave moments without an inverse


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Keep the share `density` of entries that are largest in magnitude, at least one; the others are zero.

    Source: TIES-Merging (arXiv 2306.01708), Algorithm 1, step 1, for one tensor instead of a whole model.
    """
    flat = delta.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(delta)


def elected_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Average of each entry those values that have the sign of their sum, zeros not counted.

    Source: TIES-Merging (arXiv 2306.01708), Algorithm 1, steps 2 and 3; a sum of zero counts as positive, as in peft.
    """
    sign = torch.where(sum(deltas) >= 0, 1.0, -1.0).to(deltas[0])
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in deltas:
        agrees = delta * sign > 0
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total / count.clamp(min=1.0)


def dropped(delta: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Drop entries at random, each with chance `rate`, and scale the others up so that the mean stays.

    Source: DARE (arXiv 2311.03099), Eq. (1) to (3). The mask is drawn on the CPU, so that it is the same on any device.
    """
    kept = torch.rand(delta.shape, generator=generator) >= rate
    return torch.where(kept.to(delta.device), delta / (1 - rate), 0.0)


def damped(moments: Tensor, off_diagonal: float) -> Tensor:
    """Multiply all but the diagonal of moments (d, d) by a factor; RegMean (arXiv 2212.09849), section 4.2."""
    return off_diagonal * moments + (1 - off_diagonal) * torch.diag(moments.diagonal())


def regressed(inner: Iterable[Tensor], moments: Tensor) -> Tensor:
    """Compute A_t G_t (sum of G)^-1 of all tasks, one below the other: the A of a merged branch, B_t beside each other.

    Args:
        inner: A_t G_t, (r_t, d_in) of each task.
        moments: (d_in, d_in), the sum over tasks of G_t; its trace is not zero.

    Source: RegMean (arXiv 2212.09849), Eq. (2): W = (sum G_t)^-1 sum G_t W_t for y = x W. All W_t share W_0, which
    leaves that sum unchanged, so the same holds for W_t - W_0 = B_t A_t.
    """
    rows, moments = torch.cat(list(inner)).double(), moments.double()
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return torch.linalg.solve(moments + ridge, rows.mT).mT


def nearest_product(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Find B (d_out, r) and A (r, d_in), r <= rank, whose product is nearest to a matrix; and the share of energy lost.

    At least one direction is given, a zero one for a zero matrix.
    """
    delta = as_matrix(delta, "delta").double()
    energy = float(delta.square().sum())
    if energy == 0.0:
        return delta[:, :1], torch.zeros_like(delta[:1]), 0.0
    floor = NOISE_RATIO**2
    vectors = leading_right_vectors(delta, lambda squares: min(rank, int((squares > floor * squares[0]).sum())))
    B = delta @ vectors
    return B.float(), vectors.mT.float(), max(0.0, 1 - float(B.square().sum()) / energy)
