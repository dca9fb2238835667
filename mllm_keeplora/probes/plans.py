"""How statistics of a data pass are summed: exactly or sketched, by memory where asked to, and over which tokens.

Knows sizes and accumulators of `linalg`; no model and no hooks (those are in `probes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mllm_keeplora.system import distributed
from mllm_keeplora.system.log import log

if TYPE_CHECKING:
    import torch

    from mllm_keeplora.linalg import FrequentDirections, GradientAccumulator, GradientSketch, MomentAccumulator

    Features = dict[str, MomentAccumulator | FrequentDirections]  # statistics of inputs by layer
    Gradient = GradientAccumulator | GradientSketch
    Gradients = dict[str, Gradient]  # mean gradients by layer

Statistic = Literal["auto", "exact", "sketch"]
Spacing = Literal["even", "ends"]  # of the records that are looked at, as in `data.collate`
FLOAT32 = 4  # bytes
SHARE_OF_FREE = 0.25  # of the free memory that `auto` lets statistics take
MOST_PASSES = 8  # over the records, for exact moments that do not fit all at once


@dataclass(frozen=True)
class GradientPlan:
    """Sum mean gradients as `exact` (d_out, d_in), as `sketch` of `width` columns, or `auto` by memory.

    A sketch is taken only where it is smaller than the gradient. `following` lets its directions follow the gradient,
    which captures more but depends a little on the batches; otherwise they are random and fixed. `memory_gb` None: a
    quarter of what is free. `spacing` is that of the records that are looked at.
    """

    statistic: Statistic = "exact"
    width: int = 128
    seed: int = 0
    memory_gb: float | None = None
    following: bool = False
    spacing: Spacing = "even"

    def exact(self, sizes: dict[str, tuple[int, int]]) -> bool:
        """Say whether gradients of these layers, (d_out, d_in) each, are summed exactly."""
        needed = FLOAT32 * sum(d_out * d_in for d_out, d_in in sizes.values())
        return _is_exact("gradients", self.statistic, needed, self.memory_gb)

    def accumulator(self, d_out: int, d_in: int, exact: bool, device: torch.device) -> Gradient:
        """Make a sketch, or an exact sum where that is smaller or wanted."""
        from mllm_keeplora.linalg import GradientAccumulator, GradientRange, GradientSketch

        if exact or self.width >= d_out:
            return GradientAccumulator(d_out, d_in, device=device)
        kind = GradientRange if self.following else GradientSketch
        return kind(d_out, d_in, self.width, self.seed, device=device)


@dataclass(frozen=True)
class FeaturePlan:
    """Sum features as `exact` moments (d_in, d_in), `sketch` of `size` rows (Frequent Directions), or `auto`.

    `auto` is exact where that fits into `memory_gb` (None: a quarter of what is free), all layers at once or some in
    each of a few passes; else a sketch.

    Exact moments are summed in float64 on a CPU, where it costs little: a few huge activations hold most of the energy,
    and the directions that a threshold decides about are small beside them. On a GPU they are summed in float32.
    `tokens` limits how many tokens of each kind a sample contributes, evenly spaced; None counts every token.
    `normalise` divides each token by its length, so that a few huge activations do not decide alone. `spacing` is that
    of the records that are looked at. `padding` counts tokens of a text tower behind the end of its texts, too. Without
    `first` the first token of a text does not count, where models of LLaMA's kind put activations of no meaning.
    """

    statistic: Statistic = "exact"
    size: int = 1024
    memory_gb: float | None = None
    tokens: dict[str, int] | None = None
    normalise: bool = False
    spacing: Spacing = "even"
    padding: bool = False
    first: bool = True

    def exact_rounds(
        self, unclear: Mapping[str, FrequentDirections], sketches: Sequence[FrequentDirections]
    ) -> list[list[str]]:
        """Group layers whose exact moments take no more memory than sketches did; one layer if that is too little.

        Args:
            unclear: layer -> its sketch, the same object for layers with one input, which stay together.
            sketches: of all layers.
        """
        allowed = sum(2 * each.size * each.d_in * FLOAT32 for each in {id(each): each for each in sketches}.values())
        firsts = [(layers, unclear[layers[0]]) for layers in by_identity(unclear)]
        return _packed([(layers, _size(sketch.d_in, sketch.device)) for layers, sketch in firsts], allowed)

    def exact_passes(
        self, groups: Sequence[Sequence[str]], widths: Mapping[str, int], device: torch.device
    ) -> list[list[str]] | None:
        """Group layers whose exact moments fit into what `auto` allows, which all of them at once do not.

        None where all fit, and where it would take too many passes: then a sketch has to do. To shrink a sketch of a
        wide layer costs a decomposition for each `size` tokens, many times the time of a further pass.

        Args:
            groups: layers with the same input together.
            widths: layer -> d_in.
        """
        sizes, allowed = [(group, _size(widths[group[0]], device)) for group in groups], _allowed(self.memory_gb)
        passes = _packed(sizes, allowed)
        fits = all(size <= allowed for _, size in sizes) and len(passes) <= MOST_PASSES
        return passes if fits and len(passes) > 1 else None

    def exact(self, widths: list[int], device: torch.device) -> bool:
        """Say whether features of these widths (one for each distinct input) get exact moments."""
        return _is_exact("features", self.statistic, sum(_size(d_in, device) for d_in in widths), self.memory_gb)

    def accumulator(self, d_in: int, exact: bool, device: torch.device) -> MomentAccumulator | FrequentDirections:
        from mllm_keeplora.linalg import FrequentDirections, MomentAccumulator

        if exact or 2 * self.size >= d_in:
            return MomentAccumulator(d_in, _moments_dtype(device), device)
        return FrequentDirections(d_in, self.size, device=device)


EXACT_GRADIENTS = GradientPlan()
EXACT_FEATURES = FeaturePlan()


def by_identity(objects: Mapping[str, Any]) -> list[list[str]]:
    """Group names by the object that they share, in order."""
    groups: dict[int, list[str]] = {}
    for name, each in objects.items():
        groups.setdefault(id(each), []).append(name)
    return list(groups.values())


def _moments_dtype(device: torch.device) -> torch.dtype:
    import torch

    return torch.float64 if torch.device(device).type == "cpu" else torch.float32


def _size(d_in: int, device: torch.device) -> int:
    """Bytes of exact moments."""
    return _moments_dtype(device).itemsize * d_in**2


def _packed(sizes: Iterable[tuple[Sequence[str], int]], allowed: float) -> list[list[str]]:
    """Groups of layers joined, in order, as long as their bytes are no more than allowed."""
    packed: list[list[str]] = []
    left = 0.0
    for layers, size in sizes:
        if size > left:
            packed.append([])
            left = allowed
        packed[-1] += layers
        left -= size
    return packed


def _allowed(memory_gb: float | None) -> float:
    return memory_gb * 1e9 if memory_gb is not None else SHARE_OF_FREE * distributed.free_bytes()


def _is_exact(what: str, statistic: Statistic, needed: int, memory_gb: float | None) -> bool:
    if statistic != "auto":
        return statistic == "exact"
    allowed = _allowed(memory_gb)
    if needed > allowed:
        sizes = needed / 1e9, allowed / 1e9
        log.info("%s are summed as sketches: exact sums take %.2f GB of %.2f GB allowed", what, *sizes)
    return needed <= allowed
