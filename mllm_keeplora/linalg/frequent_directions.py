"""Frequent Directions: a small deterministic stand-in for a long stream of feature rows."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from .checks import Device, as_count, as_matrix, full_precision
from .decompose import leading_eigenvectors


class FrequentDirections:
    """Keep at most `size` rows whose energy along every direction bounds that of the stream from below.

    For every unit vector v and every k < size:
    0 <= ||X v||^2 - ||S v||^2 <= ||X - X_k||_F^2 / (size - k), X the rows seen, S the sketch, X_k the best
    approximation of rank k. Up to `size` rows, and for size >= d_in, the sketch loses nothing.

    Args:
        d_in: width of a feature row.
        size: most rows of the sketch; twice as many are buffered.
        device: where the buffer lives.

    Attributes:
        total_energy: sum of squares of all rows seen, in float64; nothing is lost here.
        count: number of rows seen.

    Source: Ghashami, Liberty, Phillips and Woodruff (2016), Frequent Directions with a buffer of twice the size.
    """

    def __init__(self, d_in: int, size: int, device: Device = "cpu") -> None:
        self.d_in = as_count(d_in, "d_in", 1)
        self.size = as_count(size, "size", 1)
        self._rows = torch.zeros(0, d_in, dtype=torch.float32, device=device)
        self.total_energy, self.count = 0.0, 0

    def update(self, rows: Tensor) -> None:
        """Add feature rows (n, d_in); ValueError if the width differs or a value is not finite."""
        rows = as_matrix(rows, "rows", columns=self.d_in)
        self.total_energy += float(torch.linalg.vector_norm(rows, dtype=torch.float64).square())
        self.count += rows.shape[0]
        self._append(rows)

    def merge(self, other: FrequentDirections) -> None:
        """Add another sketch of the same width and size; the bound then holds for both streams together."""
        if not isinstance(other, FrequentDirections):
            raise ValueError(f"only a FrequentDirections can be merged here, got {type(other).__name__}")
        if (other.d_in, other.size) != (self.d_in, self.size):
            raise ValueError(
                f"sketches to merge must agree in (d_in, size), got {(self.d_in, self.size)} "
                f"and {(other.d_in, other.size)}"
            )
        self.total_energy += other.total_energy
        self.count += other.count
        self._append(other._rows)

    @property
    def sketch(self) -> Tensor:
        """The (m, d_in) float32 rows, m <= size; reading them does not change what later rows do."""
        return self._rows if self._rows.shape[0] <= self.size else _shrink(self._rows, self.size)

    @property
    def shrunken_energy(self) -> float:
        """The energy of the rows seen that the sketch no longer holds."""
        kept = float(torch.linalg.vector_norm(self.sketch, dtype=torch.float64).square())
        return max(self.total_energy - kept, 0.0)

    @property
    def device(self) -> torch.device:
        """The device that the buffer lives on."""
        return self._rows.device

    def to(self, device: Device) -> FrequentDirections:
        """Give the same sketch on another device."""
        moved = copy(self)
        moved._rows = self._rows.to(device)
        return moved

    def _append(self, rows: Tensor) -> None:
        rows = rows.to(device=self._rows.device, dtype=torch.float32)
        while rows.shape[0]:
            if self._rows.shape[0] >= 2 * self.size:
                self._rows = _shrink(self._rows, self.size)
            room = 2 * self.size - self._rows.shape[0]
            self._rows = torch.cat([self._rows, rows[:room]])
            rows = rows[room:]


def _shrink(rows: Tensor, size: int) -> Tensor:
    """Reduce rows (n, d_in) to at most `size`: every squared singular value loses the (size + 1)-th one."""
    squares = torch.zeros(0)

    def count(values: Tensor) -> int:
        nonlocal squares
        floor = values[size] if values.shape[0] > size else values.new_zeros(())
        squares = (values - floor).clamp(min=0.0)
        squares = squares[squares > torch.finfo(torch.float32).tiny]
        return squares.shape[0]

    with full_precision(rows.device):
        matrix = rows.to(torch.float64)
        if matrix.shape[0] >= matrix.shape[1]:
            directions = leading_eigenvectors(matrix.mT @ matrix, count)
        else:
            mapped = matrix.mT @ leading_eigenvectors(matrix @ matrix.mT, count)
            directions = mapped / mapped.norm(dim=0).clamp(min=torch.finfo(mapped.dtype).tiny)
        return (directions * squares.sqrt()).mT.to(torch.float32).contiguous()
