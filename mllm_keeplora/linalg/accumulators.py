"""Sums collected while batches stream by: feature moments, mean gradient, gradient sketch.

All three are linear, so sums of shards equal the sum of the whole: `merge` adds another accumulator, `tensors`
hands out what a group of processes has to sum in place. They know no model and no process group.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .checks import as_count, as_matrix, full_precision

DTYPES = (torch.float32, torch.float64)


class MomentAccumulator:
    """Running moments X^T X of features, with their exact energy and count.

    Args:
        d_in: width of a feature row.
        dtype: float32 or float64, precision of the moments; energy and count are always float64.
        device: where the sums live; products are formed where the rows are.

    Source: KeepLoRA (ICLR 2026), Eq. (8), by the Gram matrix: same left vectors, squared singular values.
    """

    def __init__(self, d_in: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.d_in = as_count(d_in, "d_in", 1)
        self._moments = torch.zeros(d_in, d_in, dtype=_sum_dtype(dtype), device=device)
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)  # energy, count

    def update(self, rows: Tensor) -> None:
        """Add feature rows (n, d_in); ValueError if the width differs or a value is not finite."""
        rows = as_matrix(rows, "rows", columns=self.d_in)
        energy = torch.linalg.vector_norm(rows, dtype=torch.float64).square()
        _add_product(self._moments, rows, rows)
        self._totals[0] += energy.to(self._totals.device)
        self._totals[1] += rows.shape[0]

    def merge(self, other: MomentAccumulator) -> None:
        """Add the sums of another accumulator of the same width and dtype."""
        _merge(self, other)

    @property
    def moments(self) -> Tensor:
        """(d_in, d_in) sum of x^T x over rows x; the live tensor, not a copy."""
        return self._moments

    @property
    def total_energy(self) -> float:
        """Sum of squares of all rows seen, summed in float64."""
        return float(self._totals[0])

    @property
    def count(self) -> int:
        """Number of rows seen."""
        return round(float(self._totals[1]))

    def tensors(self) -> list[Tensor]:
        """The tensors to sum over processes, in place: moments (d_in, d_in), energy and count (2,) float64."""
        return [self._moments, self._totals]


class GradientAccumulator:
    """Exact mean gradient of a weight, from its inputs and output gradients, summed in float32 or float64.

    Args:
        d_out: width of an output gradient row.
        d_in: width of an input row.
        dtype: float32 or float64.
        device: where the sum lives; products are formed where the rows are.

    Source: KeepLoRA (ICLR 2026), Eq. (2); the weight gradient of y = x W^T is the sum of dy^T x over rows.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d_out = as_count(d_out, "d_out", 1)
        self.d_in = as_count(d_in, "d_in", 1)
        self._sum = torch.zeros(d_out, d_in, dtype=_sum_dtype(dtype), device=device)
        self._samples = torch.zeros(1, dtype=torch.float64, device=device)

    def update(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Add grad_output^T inputs for rows grad_output (n, d_out) and inputs (n, d_in)."""
        grad_output, inputs = _gradient_rows(grad_output, inputs, self.d_out, self.d_in)
        _add_product(self._sum, grad_output, inputs)

    def count_samples(self, num_samples: int) -> None:
        """Tell how many samples the rows added since the last call came from."""
        self._samples += as_count(num_samples, "num_samples", 0)

    def merge(self, other: GradientAccumulator) -> None:
        """Add the sum and the sample count of another accumulator of the same shape and dtype."""
        _merge(self, other)

    @property
    def count(self) -> int:
        """Number of samples counted."""
        return round(float(self._samples))

    @property
    def mean(self) -> Tensor:
        """(d_out, d_in) sum of the gradients over the samples counted; ValueError before any was counted."""
        if self.count == 0:
            raise ValueError("a mean gradient needs at least 1 counted sample, got 0: call count_samples first")
        return self._sum / self.count

    def tensors(self) -> list[Tensor]:
        """The tensors to sum over processes, in place: gradient sum (d_out, d_in), sample count (1,) float64."""
        return [self._sum, self._samples]


class GradientSketch:
    """Streamed sketch Y = sum of x^T (dy Omega) of a weight gradient that is never formed.

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

    Source: Halko, Martinsson and Tropp (2011), range finder, on the gradient of KeepLoRA (ICLR 2026), Eq. (2).
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        width: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d_out = as_count(d_out, "d_out", 1)
        self.d_in = as_count(d_in, "d_in", 1)
        self.width = as_count(width, "width", 1)
        self.seed = as_count(seed, "seed", 0)
        self._test_matrix = self._first_directions(_sum_dtype(dtype), torch.device(device))
        self._sketch = torch.zeros(d_in, width, dtype=dtype, device=device)
        self._samples = torch.zeros(1, dtype=torch.float64, device=device)

    @property
    def test_matrix(self) -> Tensor:
        """(d_out, width) Omega."""
        return self._test_matrix

    def _first_directions(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _test_matrix(self.d_out, self.width, self.seed, dtype, device)

    def update(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Add inputs^T (grad_output Omega) for rows grad_output (n, d_out) and inputs (n, d_in)."""
        grad_output, inputs = _gradient_rows(grad_output, inputs, self.d_out, self.d_in)
        with full_precision(inputs.device):
            test_matrix = self._test_matrix.to(device=inputs.device, dtype=self._sketch.dtype)
            _add_product(self._sketch, inputs, grad_output.to(test_matrix.dtype) @ test_matrix)

    def count_samples(self, num_samples: int) -> None:
        """Tell how many samples the rows added since the last call came from."""
        self._samples += as_count(num_samples, "num_samples", 0)

    def merge(self, other: GradientSketch) -> None:
        """Add the sketch of another accumulator of the same shape, dtype and seed."""
        if isinstance(other, GradientSketch) and other.seed != self.seed:
            raise ValueError(f"sketches to merge must have the same seed, got {self.seed} and {other.seed}")
        _merge(self, other)

    @property
    def count(self) -> int:
        """Number of samples counted."""
        return round(float(self._samples))

    @property
    def sketch(self) -> Tensor:
        """(d_in, width) the sum so far, not divided by the samples; the live tensor, not a copy."""
        return self._sketch

    def tensors(self) -> list[Tensor]:
        """The tensors to sum over processes, in place: sketch (d_in, width), sample count (1,) float64."""
        return [self._sketch, self._samples]


# Random matrices in use; a model's layers have few different widths, so sharing them saves most of their memory.
_TEST_MATRICES: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


def _test_matrix(d_out: int, width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = d_out, width, seed, dtype, device
    matrix = _TEST_MATRICES.get(key)
    if matrix is None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(d_out, width, generator=generator, dtype=torch.float32)
        matrix = _TEST_MATRICES[key] = drawn.to(device=device, dtype=dtype)
    return matrix


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"dtype of a running sum must be torch.float32 or torch.float64, got {dtype}")
    return dtype


def _gradient_rows(grad_output: Tensor, inputs: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    grad_output = as_matrix(grad_output, "grad_output", columns=d_out)
    return grad_output, as_matrix(inputs, "inputs", columns=d_in, rows=grad_output.shape[0])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, formed on the rows' device in the precision of `total`."""
    left, right = left.to(total.dtype), right.to(total.dtype)
    with full_precision(left.device):
        if left.device == total.device:
            total.addmm_(left.mT, right)
        else:
            total.add_((left.mT @ right).to(total.device))


def _merge(mine: MomentAccumulator | GradientAccumulator | GradientSketch, other: object) -> None:
    """Add the tensors of `other` to those of `mine`; both must be of one kind, shape and dtype."""
    if type(other) is not type(mine):
        raise ValueError(f"only a {type(mine).__name__} can be merged here, got {type(other).__name__}")
    pairs = list(zip(mine.tensors(), other.tensors(), strict=True))
    for kept, added in pairs:
        if kept.shape != added.shape or kept.dtype != added.dtype:
            raise ValueError(
                f"accumulators to merge must agree in shape and dtype, got {tuple(kept.shape)} {kept.dtype} "
                f"and {tuple(added.shape)} {added.dtype}"
            )
    for kept, added in pairs:
        kept.add_(added.to(kept.device))
