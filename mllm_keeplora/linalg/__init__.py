"""Subspace algebra on tensors: energy rule, bases, moments, sketches. Knows no model.

Everything is float32 or float64 inside, whatever came in; values that are not finite are refused.
"""

from .accumulators import GradientAccumulator, GradientSketch, MomentAccumulator, output_range
from .basis import Basis, leak
from .directions import RandomizedSVD, gradient_capture, top_residual_directions
from .energy import principal_subspace, rank_for_energy
from .frequent_directions import FrequentDirections

__all__ = [
    "Basis",
    "FrequentDirections",
    "GradientAccumulator",
    "GradientSketch",
    "MomentAccumulator",
    "RandomizedSVD",
    "gradient_capture",
    "leak",
    "output_range",
    "principal_subspace",
    "rank_for_energy",
    "top_residual_directions",
]
