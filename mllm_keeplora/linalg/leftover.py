"""Features apart: what of them lies inside a subspace and what is left, from rows, moments or a sketch. In float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .accumulators import MomentAccumulator
from .checks import as_matrix, full_precision
from .decompose import NOISE_RATIO, Complement, largest_singular_value
from .frequent_directions import FrequentDirections

Features = Tensor | MomentAccumulator | FrequentDirections  # rows (n, d_in), or what was accumulated from them
SKETCH_ROUNDING = 1e-6  # share of its energy that a float32 sketch may lose by rounding alone


@dataclass(frozen=True)
class Leftover:
    """Hold features without their part inside a basis, float64: rows (n, free), or moments (free, free) of them."""

    matrix: Tensor
    complement: Complement  # that the rows are coordinates in
    is_moments: bool
    energy: float
    covered: float  # share of total_energy
    total_energy: float
    lost: float  # energy that a sketch no longer holds, beyond its rounding
    noise_floor: float  # squared singular values up to this are rounding noise


def leftover_of(source: Features, columns: Tensor) -> Leftover:
    """Remove from features the part inside a subspace of orthonormal columns (d_in, k), and measure both."""
    matrix, is_moments, noise_ratio, total = source_matrix(source, columns.shape[0])
    with full_precision(matrix.device):
        inside = columns.to(matrix)
        held = energy_of(matrix, is_moments)
        # Of moments the singular values are squares already.
        largest = largest_singular_value(matrix) ** (1 if is_moments else 2)
        complement = Complement(inside)
        left = complement.coordinates(matrix)
        if is_moments:
            left = complement.coordinates(left.mT)
        energy = max(energy_of(left, is_moments), 0.0)
    total = held if total is None else total
    covered = 1.0 if total <= 0.0 else min(max((held - energy) / total, 0.0), 1.0)
    lost = total - held if total - held > SKETCH_ROUNDING * total else 0.0
    return Leftover(left, complement, is_moments, energy, covered, max(total, 0.0), lost, noise_ratio * largest)


def source_matrix(source: Features, d_in: int) -> tuple[Tensor, bool, float, float | None]:
    """Bring features into the form that is decomposed.

    Returns:
        Float64 rows or moments; whether they are moments; noise ratio of squared values; total energy if not theirs.
    """
    if isinstance(source, MomentAccumulator):
        # The trace of the moments, not the exact energy, is the total: rounding of the sums cancels in the share.
        single = source.moments.dtype == torch.float32
        moments = as_matrix(source.moments, "moments", columns=d_in, rows=d_in).to(torch.float64)
        return moments, True, torch.finfo(torch.float32).eps if single else NOISE_RATIO**2, None
    if isinstance(source, FrequentDirections):
        rows = as_matrix(source.sketch, "sketch", columns=d_in)
        return rows.to(torch.float64), False, NOISE_RATIO**2, source.total_energy
    rows = as_matrix(source, "rows", columns=d_in)
    if rows.shape[0] <= d_in:
        return rows.to(torch.float64), False, NOISE_RATIO**2, None
    moments = torch.zeros(d_in, d_in, dtype=torch.float64, device=rows.device)
    with full_precision(rows.device):
        for part in rows.split(d_in):
            part = part.to(torch.float64)
            moments.addmm_(part.mT, part)
    return moments, True, NOISE_RATIO**2, None


def moment_rows(source: Tensor | MomentAccumulator) -> Tensor:
    """Give the moments X^T X of features, to be taken for rows.

    Their singular values are squares, so energies are sigma^4: a basis that grows by them keeps fewer directions, and
    the new ones are the left singular vectors of P X^T X in place of those of P X^T.

    Args:
        source: feature rows (n, d_in), or exact moments; a sketch lacks the small ones.

    Returns:
        (d_in, d_in), float32 or float64.

    Raises:
        ValueError: neither of the two, or a value is not finite.

    Source: how the published code of InfLoRA (CVPR 2024) and of GainLoRA measures the energy of a direction.
    """
    if isinstance(source, MomentAccumulator):
        return source.moments
    rows = as_matrix(source, "rows").to(torch.float64)
    with full_precision(rows.device):
        return rows.mT @ rows


def energy_of(matrix: Tensor, is_moments: bool) -> float:
    """Sum the squares of rows, or the diagonal of moments: their energy."""
    return float(matrix.diagonal().sum() if is_moments else matrix.square().sum())
