"""What passes take in memory: sizes that a strategy's `footprint` is computed from, and the passes that most share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm_keeplora.models.family import Sizes

Footprint = dict[str, dict[str, float]]  # stage -> what takes memory -> bytes on a device
ALWAYS = "always"  # in place of a stage: in every one, on the host beside a GPU
DOUBLES = 4  # float64 matrices of the largest width alive in a decomposition: moments, rotated, vectors, work
SKETCH = 3  # sketch columns for each direction wanted, where the options name no width


@dataclass(frozen=True)
class PassSizes:
    """Sizes of a run come from the base's skeleton before a weight is loaded."""

    base: Sizes  # what the base takes for each token
    layers: tuple[tuple[int, int], ...]  # (d_out, d_in) of every target layer
    rank: int  # of the branch
    numbers: int  # how many train
    tokens: int  # of a long record
    answer_tokens: float  # of those that carry loss
    item: int  # bytes of a number in the compute dtype
    moment: int  # bytes of a number in exact moments
    micro: int  # records per forward of a training
    probe: int  # records per forward of a data pass
    question: tuple[int, int]  # width of a question's features, with pictures and without
    checkpointing: bool = False  # whether a training keeps what goes into blocks alone
    trains_a: bool = True  # whether A trains beside B
    classes: int = 0  # whose texts are read in every batch
    domains: int = 1  # learnt before and by this run

    def graph(self, batch: int, rank: int = 0) -> float:
        """Give the bytes that the graph of a forward saves; `rank` is of the branch that trains, 0 for none."""
        inputs = self.item * sum(self.base.input_widths) if rank and self.trains_a else 0  # kept for A's gradient
        saved = (self.base.saved + inputs) * self.tokens * batch + self.base.text * self.classes
        if self.checkpointing and rank:
            saved = saved / self.base.blocks + self.base.blocks * self.base.width * self.item * self.tokens * batch
        return saved + 4 * rank * len(self.layers) * self.tokens * batch + self.answer_tokens * batch * self.base.loss

    def forward(self, batch: int) -> float:
        """Give the bytes that records' layers hold for a moment in a forward without a graph."""
        outputs, inputs = (max(each) for each in zip(*self.layers, strict=True))
        return self.item * self.tokens * (4 * inputs + 3 * outputs) * batch

    def decomposition(self) -> float:
        """Give the bytes of the widest layer's decomposition."""
        return DOUBLES * 8 * max(d_in for _, d_in in self.layers) ** 2

    def kept_bases(self) -> float:
        """Give the bytes of bases that hold half of every layer's input space, float32."""
        return 4 * sum(d_in**2 for _, d_in in self.layers) // 2


def feature_pass(sizes: PassSizes, statistic: str = "exact", sketch: int = 0) -> dict[str, float]:
    """Estimate a pass that collects the features of every target layer, and decomposes them.

    Statistics are exact moments of every distinct input, or sketches with twice their size in rows.
    """
    rows = 2 * sketch if statistic == "sketch" else math.inf
    moments = sum(4 * rows * d if rows < d else sizes.moment * d * d for d in sizes.base.input_widths)
    return {"moments": moments, "forward": sizes.forward(sizes.probe), "decomposition": sizes.decomposition()}


def gradient_pass(sizes: PassSizes, exact: bool, width: int | None = None) -> dict[str, float]:
    """Estimate a pass that collects mean gradients, exact or as sketches of so many columns.

    Inputs wait for their gradients, in half precision beside sketches.
    """
    width = width or SKETCH * sizes.rank
    sums = sum(4 * d_out * d_in if exact else 4 * width * d_in + 2 * width * d_out for d_out, d_in in sizes.layers)
    item = sizes.item if exact else min(sizes.item, 2)
    waiting = item * sizes.tokens * sizes.probe * sum(sizes.base.input_widths)
    return {"graph": sizes.graph(sizes.probe), "gradient sums": sums, "layer inputs": waiting}


def question_pass(sizes: PassSizes) -> dict[str, float]:
    """Estimate a pass over questions: embeddings and tower alone are asked, no target layer runs.

    Words are held as they are, and masked, in float32.
    """
    return {"word embeddings": 2 * 4 * sizes.base.width * sizes.tokens * sizes.probe}
