"""Subspace algebra on tensors: energy rule, bases, moments, sketches. Knows no model.

Everything is float32 or float64 inside, whatever came in; values that are not finite are refused.
"""

from .accumulators import GradientAccumulator, GradientSketch, MomentAccumulator
from .basis import Basis, leak
from .directions import RandomizedSVD, gradient_capture, top_residual_directions
from .energies import general_directions, isolated_directions, orthonormal_rows, recalibration
from .energy import principal_subspace, rank_for_energy
from .frequent_directions import FrequentDirections
from .gradient_range import GradientRange
from .leftover import moment_rows
from .low_rank import fit_last, gram_of_products
from .marked import count_marks, mark_largest, marked_entries, marked_mean
from .merging import damped, dropped, elected_mean, nearest_product, regressed, trimmed

__all__ = [
    "Basis",
    "FrequentDirections",
    "GradientAccumulator",
    "GradientRange",
    "GradientSketch",
    "MomentAccumulator",
    "RandomizedSVD",
    "count_marks",
    "damped",
    "dropped",
    "elected_mean",
    "fit_last",
    "general_directions",
    "gradient_capture",
    "gram_of_products",
    "isolated_directions",
    "leak",
    "mark_largest",
    "marked_entries",
    "marked_mean",
    "moment_rows",
    "nearest_product",
    "orthonormal_rows",
    "principal_subspace",
    "rank_for_energy",
    "recalibration",
    "regressed",
    "top_residual_directions",
    "trimmed",
]
