"""The one energy rule, and the principal subspace of a pretrained weight chosen by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import as_choice, as_float, as_matrix, as_share, full_precision
from .decompose import fix_signs, leading_right_vectors

RANK_RULES = ("reach", "below_legacy")
# A threshold counts as reached within this: sums of thousands of float64 terms are not exact, so 1.0 would
# otherwise be missed, or met only by adding directions of pure rounding noise.
SHARE_SLACK = 1e-12


def rank_for_energy(
    singular_values: Tensor, threshold: float, total: float | None = None, covered: float = 0.0, rule: str = "reach"
) -> int:
    """Count the fewest leading singular values whose energy reaches a threshold.

    The smallest m >= 0 with covered + (s_1^2 + ... + s_m^2) / total >= threshold, at most the number of values.

    Args:
        singular_values: (m_max,) non-negative, descending; singular values, not their squares.
        threshold: share of the energy to reach, in [0, 1]; reached means within 1e-12.
        total: reference energy, a sum of squares; None takes the sum of squares of `singular_values`.
        covered: share of `total` that is already covered elsewhere, at least 0.
        rule: "reach", or "below_legacy", which counts the cumulative shares below the threshold: one direction
            fewer, at least one.

    Returns:
        The count; 0 if nothing has to be added or there is no energy at all.

    Raises:
        ValueError: values not one-dimensional, descending, non-negative and finite; an argument out of range.

    Source: KeepLoRA (ICLR 2026), energy rule of Eqs. (1) and (9); "below_legacy" is what its published code does
        for weights.
    """
    values = as_float(singular_values, "singular_values").to(torch.float64)
    threshold = as_share(threshold, "threshold")
    as_choice(rule, "rule", RANK_RULES)
    if values.dim() != 1:
        raise ValueError(f"singular_values must have one dimension, got shape {tuple(values.shape)}")
    if values.numel() and (float(values[-1]) < 0.0 or bool((values.diff() > 0).any())):
        raise ValueError("singular_values must be non-negative and in descending order, got other values")
    if not math.isfinite(covered) or covered < 0.0:
        raise ValueError(f"covered must be a share of at least 0, got {covered}")
    if total is not None and not (math.isfinite(total) and total >= 0.0):
        raise ValueError(f"total must be a finite energy of at least 0, got {total}")

    cumulative = values.square().cumsum(0)
    if values.numel() == 0 or float(cumulative[-1]) == 0.0:
        return 0
    reference = float(cumulative[-1]) if total is None else float(total)
    if reference == 0.0:
        raise ValueError("total must be above 0 where singular_values hold energy, got 0")
    needed = threshold - SHARE_SLACK - covered
    missing = int((cumulative / reference < needed).sum())
    reached = min(missing + 1, values.numel()) if needed > 0.0 else 0
    return reached if rule == "reach" else max(reached - 1, 1)


def principal_subspace(weight: Tensor, energy: float, rule: str = "reach") -> Tensor:
    """Give the leading input-side directions of a weight that hold a share of its energy.

    Args:
        weight: (d_out, d_in) as torch stores it, any floating dtype.
        energy: share of ||weight||_F^2 to reach, in [0, 1]; 0 switches the protection off.
        rule: see `rank_for_energy`.

    Returns:
        (d_in, p) float32, orthonormal columns, largest singular value first, each with its entry of largest
        magnitude positive; 1 <= p <= min(d_out, d_in), or p = 0 if `energy` is 0 or the weight is zero.

    Raises:
        ValueError: not a matrix, a value is not finite, or `energy` or `rule` is out of range.

    Source: KeepLoRA (ICLR 2026), Eq. (1). Computed in float64 from the Gram matrix of the smaller side.
    """
    matrix = as_matrix(weight, "weight")
    energy = as_share(energy, "energy")
    as_choice(rule, "rule", RANK_RULES)
    if energy == 0.0:
        return matrix.new_zeros(matrix.shape[1], 0, dtype=torch.float32)

    def count(squares: Tensor) -> int:
        total = float(squares.sum())
        if total == 0.0:
            return 0
        rounding = squares.numel() * torch.finfo(squares.dtype).eps * squares[0]
        return max(rank_for_energy(squares[squares > rounding].sqrt(), energy, total=total, rule=rule), 1)

    with full_precision(matrix.device):
        return fix_signs(leading_right_vectors(matrix.to(torch.float64), count)).to(torch.float32)
