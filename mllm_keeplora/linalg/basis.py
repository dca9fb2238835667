"""A protected subspace of a layer's input space: orthonormal columns that grow, and are only forgotten on request.

Knows no layer. A basis holds float32 columns; what decides about them is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Device, as_choice, as_count, as_matrix, as_share, full_precision
from .decompose import fix_signs, leading_eigenvectors, leading_right_vectors, orthonormal_complement
from .energy import rank_for_energy
from .frequent_directions import FrequentDirections
from .leftover import Features, Leftover, energy_of, leftover_of, source_matrix

ENERGY_REFERENCES = ("total", "residual")
# Gram matrix error of given columns: up to the first they are kept bit for bit (float32 rounding of orthonormal
# columns), up to the second re-orthonormalised (columns stored in bf16 or fp16), beyond it refused.
KEEP_TOLERANCE = 5e-7
REPAIR_TOLERANCE = 2e-2


class Capacity(NamedTuple):
    """How much of an input space is taken: `share` = rank / d_in, `free` = d_in - rank."""

    rank: int
    d_in: int
    share: float
    free: int


class Basis:
    """Hold orthonormal columns in R^d_in that grow by the directions of new features.

    Args:
        d_in: dimension of the space.
        device: where the columns live.

    Attributes:
        columns: (d_in, rank) float32, orthonormal.

    Source: KeepLoRA (ICLR 2026), the unified subspace Q_t of Eqs. (3) and (10).
    """

    def __init__(self, d_in: int, device: Device = "cpu") -> None:
        self.columns = torch.zeros(as_count(d_in, "d_in", 1), 0, dtype=torch.float32, device=device)

    @classmethod
    def from_columns(cls, Q: Tensor) -> Basis:
        """Make a basis of given orthonormal columns.

        Args:
            Q: (d_in, k), k <= d_in, any floating dtype. Orthonormal to float32 rounding: kept bit for bit;
                to half-precision rounding (Gram error up to 2e-2): re-orthonormalised, same span and order.

        Raises:
            ValueError: not a matrix, too many columns, not finite, or not orthonormal.
        """
        columns = as_matrix(Q, "basis columns")
        d_in, rank = columns.shape
        if rank > d_in:
            raise ValueError(f"a basis of dimension {d_in} has at most {d_in} columns, got {rank}")
        basis = cls(d_in, device=columns.device)
        if rank:
            with full_precision(columns.device):
                exact = columns.to(torch.float64)
                identity = torch.eye(rank, dtype=torch.float64, device=exact.device)
                error = float((exact.mT @ exact - identity).abs().max())
                if error > REPAIR_TOLERANCE:
                    raise ValueError(
                        f"columns of a basis must be orthonormal to {REPAIR_TOLERANCE}, got a Gram error of {error:.3g}"
                    )
                if error > KEEP_TOLERANCE:
                    exact = orthonormal_complement(exact, exact[:, :0])
                if exact.shape[1] != rank:
                    raise ValueError(f"columns of a basis must be independent, got rank {exact.shape[1]} of {rank}")
                basis.columns = exact.to(torch.float32, copy=True)
        return basis

    def to(self, device: Device) -> Basis:
        """Give the same basis on another device."""
        moved = Basis(self.d_in, device)
        moved.columns = self.columns.to(device)
        return moved

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.columns.shape[1]

    @property
    def d_in(self) -> int:
        """The dimension of the space."""
        return self.columns.shape[0]

    def project(self, X: Tensor) -> Tensor:
        """Give the part of rows X (n, d_in) inside the subspace: X Q Q^T, float64 for float64 rows, else float32."""
        rows = as_matrix(X, "X", columns=self.d_in)
        with full_precision(rows.device):
            columns = self.columns.to(rows)
            return (rows @ columns) @ columns.mT

    def residual(self, X: Tensor) -> Tensor:
        """Give the part of rows X (n, d_in) outside the subspace: X - X Q Q^T, in the dtype of `project`."""
        return as_matrix(X, "X", columns=self.d_in) - self.project(X)

    def append(self, columns: Tensor) -> None:
        """Take in (d_in, k) directions that `missing` gave, here or in another process; earlier columns stay."""
        self.columns = torch.cat([self.columns, columns.to(self.columns)], dim=1)

    def grow(
        self,
        moments_or_rows: Features,
        energy: float,
        reference: str = "total",
        limit: int | None = None,
        rule: str = "reach",
    ) -> int:
        """Append what is `missing` by the same arguments; returns how many columns that is."""
        added = self.missing(moments_or_rows, energy, reference, limit, rule)
        self.append(added)
        return added.shape[1]

    def missing(
        self,
        moments_or_rows: Features,
        energy: float,
        reference: str = "total",
        limit: int | None = None,
        rule: str = "reach",
    ) -> Tensor:
        """Give the fewest directions with which the basis would cover a share of the energy of new features.

        Args:
            moments_or_rows: feature rows (n, d_in), not centred; or what was accumulated from them. Of a sketch, the
                energy it no longer holds counts as not covered, which errs on the side of adding directions.
            energy: share to reach, in [0, 1].
            reference: "total": of all energy, what is covered already counts; "residual": of the energy outside
                the basis alone, which always adds directions while there is any.
            limit: most columns to add; None for no limit but d_in.
            rule: see `rank_for_energy`.

        Returns:
            (d_in, k), orthonormal and orthogonal to the basis, in order of falling energy, their entry of largest
            magnitude positive; none if the features are covered or carry no energy.

        Raises:
            ValueError: the width differs, a value is not finite, or an argument is out of range.

        Source: KeepLoRA (ICLR 2026), Eqs. (8)-(10). Directions below rounding noise are never added: singular
            values up to 1e-6 of the features' largest one, 3.5e-4 for float32 moments.
        """
        leftover, total = self._left(moments_or_rows, energy, reference)
        covered = leftover.covered if reference == "total" else 0.0
        room = self.d_in - self.rank
        if limit is not None:
            room = min(room, as_count(limit, "limit", 0))
        if room == 0 or total == 0.0 or covered >= energy:
            return self.columns[:, :0]

        def count(squares: Tensor) -> int:
            signal = squares[squares > leftover.noise_floor]
            return min(rank_for_energy(signal.sqrt(), energy, total=total, covered=covered, rule=rule), room)

        with full_precision(leftover.matrix.device):
            leading = leading_eigenvectors if leftover.is_moments else leading_right_vectors
            added = leftover.complement.lift(leading(leftover.matrix, count))
            return fix_signs(added).to(self.columns)

    def is_decided(self, sketch: FrequentDirections, energy: float, reference: str = "total") -> bool:
        """Tell whether a sketch knows enough to grow by, for all the energy that it lost.

        If not, even all directions of the sketch would not be known to reach the threshold, and the exact moments are
        needed. Arguments and errors as in `missing`.
        """
        leftover, total = self._left(sketch, energy, reference)
        return leftover.lost <= (1.0 - energy) * total

    def _left(self, moments_or_rows: Features, energy: float, reference: str) -> tuple[Leftover, float]:
        """What of features is outside the basis, and the energy that a share is of."""
        as_share(energy, "energy")
        as_choice(reference, "reference", ENERGY_REFERENCES)
        leftover = leftover_of(moments_or_rows, self.columns)
        return leftover, leftover.total_energy if reference == "total" else leftover.energy + leftover.lost

    def coverage(self, moments_or_rows: Features) -> float:
        """Measure the share of the energy of features inside the subspace: in [0, 1], 1 if they carry none.

        For a sketch this is a lower bound.
        """
        return leftover_of(moments_or_rows, self.columns).covered

    def energies(self, moments_or_rows: Features) -> Tensor:
        """Measure the share of the energy of features along each column, q^T C q / tr C.

        Returns:
            (rank,) float64 on the CPU; lower bounds for a sketch, zeros if the features carry no energy.
        """
        matrix, is_moments, _, total = source_matrix(moments_or_rows, self.d_in)
        with full_precision(matrix.device):
            columns = self.columns.to(matrix)
            image = matrix @ columns
            along = (columns * image).sum(dim=0) if is_moments else image.square().sum(dim=0)
        total = energy_of(matrix, is_moments) if total is None else total
        return (along.clamp(min=0.0) / total).cpu() if total > 0.0 else torch.zeros(self.rank, dtype=torch.float64)

    def forget(self, columns: Sequence[int]) -> None:
        """Give columns up; the others stay as they are and in order. ValueError if there is no such column."""
        gone = set(columns)
        if gone - set(range(self.rank)):
            raise ValueError(f"columns to forget must be in 0..{self.rank - 1}, got {sorted(gone)}")
        self.columns = self.columns[:, [i for i in range(self.rank) if i not in gone]]

    def round_last(self, count: int, dtype: torch.dtype) -> None:
        """Round the last `count` columns to a coarser dtype, as a file of that dtype would keep them."""
        first = self.rank - as_count(count, "count", 0)
        rounded = self.columns[:, first:].to(dtype).to(self.columns.dtype)
        self.columns = torch.cat([self.columns[:, :first], rounded], dim=1)

    def capacity(self) -> Capacity:
        """Count the columns and the directions left."""
        return Capacity(self.rank, self.d_in, self.rank / self.d_in, self.d_in - self.rank)


def leak(delta_weight: Tensor, basis: Basis) -> float:
    """Measure the share of a weight change's norm that acts inside a protected subspace, ||dW Q||_F / ||dW||_F.

    Args:
        delta_weight: (d_out, d_in).
        basis: protected subspace of dimension d_in.

    Returns:
        A number in [0, 1]; 0 for a zero change.

    Raises:
        ValueError: d_in differs or a value is not finite.
    """
    delta = as_matrix(delta_weight, "delta_weight", columns=basis.d_in).to(torch.float64)
    norm = float(delta.norm())
    if norm == 0.0:
        return 0.0
    with full_precision(delta.device):
        return min(float((delta @ basis.columns.to(delta)).norm()) / norm, 1.0)
