"""A sketch of a gradient whose directions follow it: with every batch the weakest give way to what the batch brings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .accumulators import GradientSketch, drawn
from .checks import Device, NotFinite, full_precision

RENEWED_AFTER = 6  # times the width, in rows since the last time: renewing costs as much as summing about so many
FRESH = 3  # one of so many directions is given up for a new one at every update
STANDS_OUT = 0.5  # length outside the kept directions that a new one of length 1 must have: less is their rounding


class GradientRange(GradientSketch):
    """Stream a weight gradient G as Omega Y^T; Omega (d_out, width) is about the leading range of G so far.

    An update, once six times as many rows have come as there are directions, gives up the third of them along which
    least was held and takes the leading ones of the new rows outside the others instead; every update adds
    inputs^T (grad_output Omega) to Y. What falls out of the range is lost, so the energy held is at most G's. At half
    their width it captures more of G's leading part than fixed directions, which know a first batch at best.

    Held are Y (d_in, width) float32 and Omega, orthonormal up to the bfloat16 that it is kept in. Unlike a
    `GradientSketch` it is not linear; `merge` takes the range of both, as a group of processes does by `reach`, a sum
    of those, `turn`, and a sum of `tensors`.

    Args:
        d_out, d_in, width, device: as of a `GradientSketch`.
        seed: of the random matrix (d_in, width) that ranges are found with, the same for every update.

    Source: range finder of Halko, Martinsson and Tropp (2011); giving up the weakest directions as in Frequent
    Directions of Ghashami et al. (2016), here without shrinking the others.
    """

    def __init__(self, d_out: int, d_in: int, width: int, seed: int, device: Device = "cpu") -> None:
        super().__init__(d_out, d_in, width, seed, torch.float32, device)
        self._is_begun, self._rows_since = False, 0
        self._fresh = max(1, width // FRESH)
        # Held here, as they are shared by layers of one width for as long as one of them holds them.
        self._drawn = drawn(d_in, width, seed, torch.float32, self._sum.device)
        self._drawn_fresh = drawn(d_in, self._fresh, seed, torch.float32, self._sum.device)

    def _first_directions(self) -> Tensor:
        return torch.zeros(self.d_out, self.width, dtype=torch.bfloat16, device=self._sum.device)

    def update(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Take in rows grad_output (n, d_out) and inputs (n, d_in); ValueError if a value is not finite."""
        grad_output, inputs = self._rows(grad_output, inputs)
        self._rows_since += len(inputs)
        with full_precision(inputs.device):
            if self._rows_since < RENEWED_AFTER * self.width and self._is_begun:
                held = self.test_matrix.to(self._sum)
            else:
                held = self._renewed(grad_output, inputs)
                self.test_matrix.copy_(held)
                self._rows_since, self._is_begun = 0, True
            self._sum.addmm_(inputs.mT, grad_output @ held)
        _refuse_non_finite(self._sum)

    def _rows(self, grad_output: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if grad_output.shape != (len(inputs), self.d_out) or inputs.shape != (len(inputs), self.d_in):
            super()._rows(grad_output, inputs)  # tells what is wrong
        return grad_output.to(self._sum), inputs.to(self._sum)

    def _renewed(self, grad_output: Tensor, inputs: Tensor) -> Tensor:
        """Omega (d_out, width) float32 for the old and these rows; Y is brought along."""
        if not self._is_begun:
            brought = grad_output.mT @ (inputs @ self._drawn)
            _refuse_non_finite(brought)
            return _rounded(torch.linalg.qr(brought)[0])
        fresh, before = self._fresh, self.test_matrix.to(self._sum)
        strength = torch.linalg.eigh(self._sum.mT @ self._sum).eigenvectors  # weakest first
        rotation = 1.5 * strength - 0.5 * (before.mT @ before) @ strength  # and a Newton step: rounding would pile up
        held = before @ rotation
        self._sum.copy_(self._sum @ rotation)
        weak, kept = held.tensor_split([fresh], dim=1)
        brought = grad_output.mT @ (inputs @ self._drawn_fresh)
        _refuse_non_finite(brought)
        new = torch.linalg.qr(brought - kept @ (kept.mT @ brought))[0]
        new = new - kept @ (kept.mT @ new)
        new *= torch.linalg.vector_norm(new, dim=0) > STANDS_OUT
        self._sum[:, :fresh] = self._sum[:, :fresh] @ (weak.mT @ new)
        held[:, :fresh] = new
        return _rounded(held)

    def reach(self) -> Tensor:
        """Give what is held of G times the random matrix: (d_out, width) float32."""
        with full_precision(self._sum.device):
            return self.test_matrix.to(self._sum) @ (self._sum.mT @ self._drawn)

    def turn(self, reach: Tensor) -> None:
        """Let Omega span what `reach` does, and carry over what lies within."""
        before = self.test_matrix.to(self._sum)
        with full_precision(self._sum.device):
            self.test_matrix = torch.linalg.qr(reach)[0].to(torch.bfloat16)
            self._sum.copy_(self._sum @ (before.mT @ self.test_matrix.to(self._sum)))
        self._is_begun = True

    def merge(self, other: GradientSketch) -> None:
        """Take in another one of the same shape and seed; it is turned to the common range."""
        if not isinstance(other, GradientRange):
            raise ValueError(f"only a GradientRange can be merged here, got {type(other).__name__}")
        if (self.d_out, self.d_in, self.width, self.seed) != (other.d_out, other.d_in, other.width, other.seed):
            raise ValueError("ranges to merge must agree in shape and seed")
        reach = self.reach() + other.reach().to(self._sum.device)
        self.turn(reach)
        other.turn(reach.to(other._sum.device))
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs.to(mine.device))


def _refuse_non_finite(product: Tensor) -> None:
    """What is wrong with the rows shows in every product of them, which is smaller."""
    if not math.isfinite(product.sum()):
        raise NotFinite("grad_output and inputs must be finite, got NaN or infinite values")


def _rounded(columns: Tensor) -> Tensor:
    """As they are kept, so that the sums are along the very same."""
    return columns.to(torch.bfloat16).to(columns.dtype)
