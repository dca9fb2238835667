"""What passes take in memory: sizes that a strategy's `footprint` is computed from, and the passes that most share."""

from __future__ import annotations

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
    """Sizes of a run, from the base's skeleton before a weight is loaded.

    Attributes:
        base: what the base takes for each token.
        layers: (d_out, d_in) of every target layer.
        rank: of the branch.
        numbers: how many train.
        tokens: of a long record; `answer_tokens` of them carry loss.
        item: bytes of a number in the compute dtype; `moment` of one in exact moments.
        micro, probe: records per forward of a training and of a data pass.
        question: width of a question's features, with pictures and without.
        checkpointing: whether a training keeps what goes into blocks alone.
    """

    base: Sizes
    layers: tuple[tuple[int, int], ...]
    rank: int
    numbers: int
    tokens: int
    answer_tokens: float
    item: int
    moment: int
    micro: int
    probe: int
    question: tuple[int, int]
    checkpointing: bool = False

    def graph(self, batch: int, rank: int = 0) -> float:
        """Bytes that the graph of a forward saves; `rank` is of the branch that trains, 0 for none."""
        saved = self.base.saved * self.tokens * batch
        if self.checkpointing and rank:
            saved = saved / self.base.blocks + self.base.blocks * self.base.width * self.item * self.tokens * batch
        return saved + 4 * rank * len(self.layers) * self.tokens * batch + self.answer_tokens * batch * self.base.loss

    def forward(self, batch: int) -> float:
        """Bytes that records' layers hold for a moment in a forward without a graph."""
        outputs, inputs = (max(each) for each in zip(*self.layers, strict=True))
        return self.item * self.tokens * (4 * inputs + 3 * outputs) * batch

    def decomposition(self) -> float:
        """Bytes of the widest layer's decomposition."""
        return DOUBLES * 8 * max(d_in for _, d_in in self.layers) ** 2

    def kept_bases(self) -> float:
        """Bytes of bases that hold half of every layer's input space, float32."""
        return 4 * sum(d_in**2 for _, d_in in self.layers) // 2

    def moments(self, statistic: str = "exact", sketch: int = 0) -> float:
        """Bytes of exact moments of every distinct input, or of sketches, which have twice their size in rows."""
        rows, widths = 2 * sketch, self.base.input_widths
        if statistic != "sketch":
            return self.moment * sum(width * width for width in widths)
        return sum(4 * rows * width if rows < width else self.moment * width * width for width in widths)

    def gradient_sums(self, exact: bool, width: int | None = None) -> float:
        """Bytes of mean gradients, exact or as sketches of so many columns."""
        if exact:
            return 4 * sum(d_out * d_in for d_out, d_in in self.layers)
        width = width or SKETCH * self.rank
        return sum(4 * width * d_in + 2 * width * d_out for d_out, d_in in self.layers)


def feature_pass(sizes: PassSizes, statistic: str = "exact", sketch: int = 0) -> dict[str, float]:
    """What a pass takes that collects the features of every target layer, and decomposes them."""
    moments, forward = sizes.moments(statistic, sketch), sizes.forward(sizes.probe)
    return {"moments": moments, "forward": forward, "decomposition": sizes.decomposition()}


def gradient_pass(sizes: PassSizes, exact: bool, width: int | None = None) -> dict[str, float]:
    """What a pass takes that collects mean gradients; inputs wait for them, in half precision beside sketches."""
    waiting = (sizes.item if exact else min(sizes.item, 2)) * sizes.tokens * sizes.probe * sum(sizes.base.input_widths)
    graph, sums = sizes.graph(sizes.probe), sizes.gradient_sums(exact, width)
    return {"graph": graph, "gradient sums": sums, "layer inputs": waiting}
