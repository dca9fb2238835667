"""Experience replay: every batch is joined by records of earlier domains out of a bounded buffer.

One low-rank branch is trained on from domain to domain. The buffer is a uniform sample of all records of the domains
finished so far (a reservoir of references); the loss is the mean over the answer tokens of new and buffered records
together, L = (sum of new + sum of buffered) / (tokens of both).
Source: Chaudhry et al. 2019 (arXiv 1902.10486), which takes as many buffered records as new ones at every step.
Departures from the published code (facebookresearch/agem): each domain's records are offered to the buffer once and
after the domain, so that several epochs count no more than one and only earlier domains are replayed; records are drawn
with replacement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mllm_keeplora.strategies.base import Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.plain import carried_branch

if TYPE_CHECKING:
    from torch import Tensor


class ReplayOptions(StrategyOptions):
    """`buffer`: records kept, of all domains together. None is published for LLaVA; of text, TRACE keeps a tenth.

    `ratio`: buffered records for each new one; 1 as published (10 and 10), which doubles what a micro-batch holds.
    """

    buffer: int = Field(1000, ge=1)
    ratio: float = Field(1.0, gt=0.0)


class Replay(Strategy):
    """Stores the branch, and domain and number of each record in the buffer; the records stay where they are."""

    Options: ClassVar[type[StrategyOptions]] = ReplayOptions
    options: ReplayOptions

    def __init__(self, options: StrategyOptions):
        super().__init__(options)
        self.load_state_dict({})

    def before_domain(self, context: Context) -> None:
        context.branches.open(carried_branch(context, self.options))

    def batch(self, context: Context, batch: dict[str, Any]) -> dict[str, Any]:
        """Join this micro-batch's part of the records that are replayed in the optimizer step; it may be none."""
        if not len(self.buffer):
            return batch
        count = max(1, round(self.options.ratio * context.batch_size))
        chosen = context.drawn(len(self.buffer), count)
        if not chosen:
            return batch
        return context.joined(batch, context.batch_of([self.buffer.references[place] for place in chosen]))

    def after_domain(self, context: Context) -> None:
        self.buffer.offer(context.domain.index, context.num_records, context.rng)

    def state_dict(self) -> dict[str, Tensor]:
        return {"buffer": self.buffer.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        from mllm_keeplora.data.reservoir import Reservoir

        self.buffer = Reservoir(self.options.buffer)
        if state:
            self.buffer.load(state["buffer"])
