"""A-GEM: a gradient that would raise the loss on records of earlier domains gives up the part that does.

One low-rank branch is trained on from domain to domain. Before every step the gradient g of the batch meets the
gradient r of the mean loss on random records of a buffer, all trained parameters as one vector:
if g.r < 0, then g <- g - (g.r / r.r) r, the nearest vector that does not raise the buffered records' loss. Clipping and
Adam come after it, and Adam's step may have another direction; published is plain gradient descent.
Source: Chaudhry et al. 2019 (ICLR, arXiv 1812.00420), the projection rule of A-GEM; r is without dropout, as there.
Departures from the published code (facebookresearch/agem): the buffer is a uniform sample of all records seen, as
there are no classes to take equally many of; both means are over answer tokens; records are drawn with replacement.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.base import Context, Need, Step, StrategyOptions
from mllm_keeplora.strategies.baselines.buffered import Buffered, BufferOptions
from mllm_keeplora.strategies.footprint import Footprint, PassSizes


class AGEMOptions(BufferOptions):
    """The published buffer holds 13 records for each of 85 classes, near a thousand.

    A published reference has 256 records beside batches of 10, for small networks; a `ratio` of 1 keeps a step at about
    twice the cost.
    """


class AGEM(Buffered):
    """Stores the branch, and domain and number of each record in the buffer; the records stay where they are."""

    Options: ClassVar[type[StrategyOptions]] = AGEMOptions
    joins_domains: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    options: AGEMOptions

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate the graph: the reference gradient takes as many records at a time as a data pass does."""
        return {"train": {"graph": sizes.graph(max(sizes.micro, sizes.probe), sizes.rank)}}

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        """Project the gradient where it would raise the buffered records' loss."""
        if phase == "post" or not len(self.buffer):
            return
        reference = context.passes.loss_gradients(self.drawn(step))
        trained = context.branches.trainable()
        used = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
        product = float(sum((gradient * reference[name]).sum() for name, gradient in used.items()))
        if product >= 0:
            return
        share = product / float(sum(each.square().sum() for each in reference.values()))
        for name, parameter in trained.items():
            change = -share * reference[name]
            parameter.grad = used[name] + change if name in used else change
