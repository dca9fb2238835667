"""Where a new adapter may write: the leading gradient directions outside a protected subspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .accumulators import GradientAccumulator, GradientSketch
from .basis import Basis
from .checks import as_count, as_matrix, full_precision
from .decompose import NOISE_RATIO, fix_signs, largest_singular_value, leading_right_vectors, orthonormal_complement

Gradient = Tensor | GradientAccumulator | GradientSketch  # a mean gradient (d_out, d_in), or what was accumulated of it


@dataclass(frozen=True)
class RandomizedSVD:
    """Find a range in place of an exact decomposition: width rank + `oversample`, then `power_iterations`.

    `oversample` None makes the width 4 times the rank; the published LLaVA code has oversample 0 and 2 iterations,
    its CLIP code width 4 r and 4 iterations, both without a seed. Source: Halko, Martinsson and Tropp (2011).
    """

    oversample: int | None = None
    power_iterations: int = 4
    seed: int = 0


def top_residual_directions(
    gradient: Gradient, basis: Basis, rank: int, randomized: RandomizedSVD | None = None
) -> Tensor:
    """Give the leading input-side directions of a gradient after its part inside a basis is removed.

    Args:
        gradient: mean gradient (d_out, d_in), or what was accumulated of it; from a sketch the directions are
            approximate, their orthogonality to the basis is not.
        basis: protected subspace of dimension d_in.
        rank: most directions to return, at least 1.
        randomized: approximate the decomposition; None computes it exactly.

    Returns:
        (rank', d_in) float32, or float64 for a float64 gradient; orthonormal rows, orthogonal to the basis, largest
        singular value first, each with its entry of largest magnitude positive. rank' < rank, possibly 0, if fewer
        directions carry signal: more than 1e-6 of the largest singular value of the gradient before projection.

    Raises:
        ValueError: d_in differs, a value is not finite, or `rank` is not a positive whole number.

    Source: KeepLoRA (ICLR 2026), Eqs. (3) and (4), with a test for an exhausted residual space that the published
        code lacks: there rounding noise inside the protected subspace fills the missing directions.
    """
    as_count(rank, "rank", 1)
    matrix = _gradient_matrix(gradient, basis)
    with full_precision(matrix.device):
        exact = matrix.to(torch.float64)
        columns = basis.columns.to(exact)
        floor = (NOISE_RATIO * largest_singular_value(exact)) ** 2
        residual = exact
        for _ in range(2):  # twice: the first time leaves a part inside the basis at rounding level
            residual = residual - (residual @ columns) @ columns.mT
        most = min(rank, basis.d_in - basis.rank)

        def count(squares: Tensor) -> int:
            return min(int((squares > floor).sum()), most)

        if randomized is None:
            leading = leading_right_vectors(residual, count)
        else:
            leading = _randomized_right_vectors(residual, rank, randomized, count)
        return fix_signs(orthonormal_complement(leading, columns)).mT.to(matrix.dtype).contiguous()


def gradient_capture(gradient: Gradient, basis: Basis, A: Tensor) -> dict[str, float]:
    """Split a gradient's energy into what is protected, what an adapter can use, and what is discarded.

    Args:
        gradient: as in `top_residual_directions`; from a sketch the shares are estimates.
        basis: protected subspace of dimension d_in.
        A: (r, d_in) of an adapter, orthonormal rows orthogonal to the basis (bf16 rounding is allowed).

    Returns:
        `protected`, `captured` and `discarded`, shares of ||G||_F^2 that sum to 1, and `captured_of_residual`, the
        captured share of what is outside the basis (0 if nothing is). All are 0 for a zero gradient. The headline
        ||A A^T G||_F / ||G||_F of the paper's diagnostics is the square root of `captured`.

    Raises:
        ValueError: a shape differs, a value is not finite, or the rows of `A` are not orthonormal.
    """
    matrix = _gradient_matrix(gradient, basis).to(torch.float64)
    rows = as_matrix(A, "A", columns=basis.d_in)
    adapter = Basis.from_columns(rows.mT.to(matrix.device))
    total = float(matrix.square().sum())
    if total == 0.0:
        return dict.fromkeys(("protected", "captured", "discarded", "captured_of_residual"), 0.0)
    residual = basis.residual(matrix)
    with full_precision(matrix.device):
        outside = min(float(residual.square().sum()), total)
        captured = min(float((residual @ adapter.columns.to(residual)).square().sum()), outside)
    return {
        "protected": (total - outside) / total,
        "captured": captured / total,
        "discarded": (outside - captured) / total,
        "captured_of_residual": captured / outside if outside > 0.0 else 0.0,
    }


def _randomized_right_vectors(matrix: Tensor, rank: int, how: RandomizedSVD, count: Callable[[Tensor], int]) -> Tensor:
    """About the leading right singular vectors (d, m) of a matrix (n, d), m = count(squared values of the range)."""
    width = 4 * rank if how.oversample is None else rank + how.oversample
    width = min(width, *matrix.shape)
    generator = torch.Generator().manual_seed(how.seed)
    test_matrix = torch.randn(matrix.shape[0], width, generator=generator, dtype=torch.float64).to(matrix.device)
    spanned = torch.linalg.qr(matrix.mT @ test_matrix)[0]
    for _ in range(how.power_iterations):
        spanned = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ spanned)[0])[0]
    return spanned @ leading_right_vectors(matrix @ spanned, count)


def _gradient_matrix(gradient: Gradient, basis: Basis) -> Tensor:
    """Rows (any, d_in) with the gradient's input-side directions and, up to a factor, its energy."""
    if isinstance(gradient, GradientAccumulator):
        gradient = gradient.mean
    if isinstance(gradient, GradientSketch):
        gradient = gradient.sketch.mT
    return as_matrix(gradient, "gradient", columns=basis.d_in)
