"""Sums collected while batches stream by: feature moments, mean gradient, gradient sketch.

All three are linear, so sums of shards equal the sum of the whole: `merge` adds another accumulator, `tensors`
hands out what a group of processes has to sum in place. They know no model and no process group.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .checks import Device, as_count, as_matrix, full_precision

DTYPES = (torch.float32, torch.float64)


class _Sum:
    """A sum of products, and beside it counts in float64, of which the last is that of rows or samples."""

    def __init__(self, shape: tuple[int, int], counts: int, dtype: torch.dtype, device: Device) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype of a running sum must be torch.float32 or torch.float64, got {dtype}")
        self._sum = torch.zeros(shape, dtype=dtype, device=device)
        self._counts = torch.zeros(counts, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """The number of rows or samples counted."""
        return round(float(self._counts[-1]))

    def tensors(self) -> list[Tensor]:
        """Give the tensors to sum over processes in place: the sum, and the counts in float64."""
        return [self._sum, self._counts]

    def merge(self, other: _Sum) -> None:
        """Add the sums of another accumulator; ValueError unless it has the same kind, shape and dtype."""
        if type(other) is not type(self):
            raise ValueError(f"only a {type(self).__name__} can be merged here, got {type(other).__name__}")
        kept, added = self._sum, other._sum
        if kept.shape != added.shape or kept.dtype != added.dtype:
            raise ValueError(
                f"accumulators to merge must agree in shape and dtype, got {tuple(kept.shape)} {kept.dtype} "
                f"and {tuple(added.shape)} {added.dtype}"
            )
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs.to(mine.device))


class MomentAccumulator(_Sum):
    """Sum the moments X^T X of features, with their exact energy and count.

    Args:
        d_in: width of a feature row.
        dtype: float32 or float64, precision of the moments; energy and count are always float64.
        device: where the sums live; products are formed where the rows are.

    Source: KeepLoRA (ICLR 2026), Eq. (8), by the Gram matrix: same left vectors, squared singular values.
    """

    def __init__(self, d_in: int, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> None:
        self.d_in = as_count(d_in, "d_in", 1)
        super().__init__((d_in, d_in), 2, dtype, device)

    def update(self, rows: Tensor) -> None:
        """Add feature rows (n, d_in); ValueError if the width differs or a value is not finite."""
        rows = as_matrix(rows, "rows", columns=self.d_in)
        energy = torch.linalg.vector_norm(rows, dtype=torch.float64).square()
        _add_product(self._sum, rows, rows)
        self._counts[0] += energy.to(self._counts.device)
        self._counts[1] += rows.shape[0]

    @property
    def moments(self) -> Tensor:
        """The (d_in, d_in) sum of x^T x over rows x, live and not a copy."""
        return self._sum

    @property
    def total_energy(self) -> float:
        """The sum of squares of all rows seen, summed in float64."""
        return float(self._counts[0])


class _GradientSum(_Sum):
    """A sum over the rows of a layer's inputs and output gradients, which come from counted samples."""

    def count_samples(self, num_samples: int) -> None:
        """Tell how many samples the rows added since the last call came from."""
        self._counts += as_count(num_samples, "num_samples", 0)

    def _rows(self, grad_output: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        grad_output = as_matrix(grad_output, "grad_output", columns=self.d_out)
        return grad_output, as_matrix(inputs, "inputs", columns=self.d_in, rows=grad_output.shape[0])


class GradientAccumulator(_GradientSum):
    """Sum the exact mean gradient of a weight from its inputs and output gradients, in float32 or float64.

    Args:
        d_out: width of an output gradient row.
        d_in: width of an input row.
        dtype: float32 or float64.
        device: where the sum lives; products are formed where the rows are.

    Source: KeepLoRA (ICLR 2026), Eq. (2); the weight gradient of y = x W^T is the sum of dy^T x over rows.
    """

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> None:
        self.d_out, self.d_in = as_count(d_out, "d_out", 1), as_count(d_in, "d_in", 1)
        super().__init__((d_out, d_in), 1, dtype, device)

    def update(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Add grad_output^T inputs for rows grad_output (n, d_out) and inputs (n, d_in)."""
        _add_product(self._sum, *self._rows(grad_output, inputs))

    @property
    def mean(self) -> Tensor:
        """The (d_out, d_in) gradient sum over the samples counted; ValueError before any was counted."""
        if self.count == 0:
            raise ValueError("a mean gradient needs at least 1 counted sample, got 0: call count_samples first")
        return self._sum / self.count


class GradientSketch(_GradientSum):
    """Stream a sketch Y = sum of x^T (dy Omega) of a weight gradient that is never formed.

    Omega is (d_out, width), standard normal, drawn on the CPU from a generator of its own, so equal seeds give
    equal matrices on every process and device; layers of the same width share it. The columns of Y span about the
    leading input-side directions of the gradient; its energy is about width times the gradient's.

    Args:
        d_out: width of an output gradient row.
        d_in: width of an input row.
        width: number of sketch columns; at least 4 times the rank wanted.
        seed: seed of Omega.
        dtype: float32 or float64.
        device: where the sum and Omega live; products are formed where the rows are.

    Attributes:
        test_matrix: (d_out, width) Omega.

    Source: Halko, Martinsson and Tropp (2011), range finder, on the gradient of KeepLoRA (ICLR 2026), Eq. (2).
    """

    def __init__(
        self, d_out: int, d_in: int, width: int, seed: int, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> None:
        self.d_out, self.d_in = as_count(d_out, "d_out", 1), as_count(d_in, "d_in", 1)
        self.width, self.seed = as_count(width, "width", 1), as_count(seed, "seed", 0)
        super().__init__((d_in, width), 1, dtype, device)
        self.test_matrix = self._first_directions()

    @property
    def sketch(self) -> Tensor:
        """The (d_in, width) sum so far, not divided by the samples, live and not a copy."""
        return self._sum

    def _first_directions(self) -> Tensor:
        return drawn(self.d_out, self.width, self.seed, self._sum.dtype, self._sum.device)

    def update(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Add inputs^T (grad_output Omega) for rows grad_output (n, d_out) and inputs (n, d_in)."""
        grad_output, inputs = self._rows(grad_output, inputs)
        with full_precision(inputs.device):
            test_matrix = self.test_matrix.to(device=inputs.device, dtype=self._sum.dtype)
            _add_product(self._sum, inputs, grad_output.to(test_matrix.dtype) @ test_matrix)

    def merge(self, other: GradientSketch) -> None:
        """Add the sketch of another accumulator of the same shape, dtype and seed."""
        if isinstance(other, GradientSketch) and other.seed != self.seed:
            raise ValueError(f"sketches to merge must have the same seed, got {self.seed} and {other.seed}")
        super().merge(other)


# Random matrices in use; a model's layers have few different widths, so sharing them saves most of their memory.
_DRAWN: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


def drawn(d: int, width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give the standard normal (d, width) matrix of a seed, the same tensor for as long as somebody holds it."""
    key = d, width, seed, dtype, device
    matrix = _DRAWN.get(key)
    if matrix is None:
        normal = torch.randn(d, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        matrix = _DRAWN[key] = normal.to(device=device, dtype=dtype)
    return matrix


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, formed on the rows' device in the precision of `total`."""
    left, right = left.to(total.dtype), right.to(total.dtype)
    with full_precision(left.device):
        if left.device == total.device:
            total.addmm_(left.mT, right)
        else:
            total.add_((left.mT @ right).to(total.device))
