"""What strategies share that keep a bounded sample of past records (replay, A-GEM): a carried branch, a reservoir."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mllm_keeplora.data.reservoir import Reservoir
from mllm_keeplora.strategies.base import Branch, Context, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch

if TYPE_CHECKING:
    from torch import Tensor


class BufferOptions(StrategyOptions):
    buffer: int = Field(1000, ge=1)  # records kept, of all domains together
    ratio: float = Field(1.0, gt=0.0)  # buffered records for each one of a batch


class Buffered(Strategy):
    """Stores the branch, and domain and number of each record in the buffer; the records stay where they are."""

    options: BufferOptions

    def __init__(self, options: StrategyOptions):
        super().__init__(options)
        self.load_state_dict({})

    def before_domain(self, context: Context) -> Branch:
        return carried_branch(context, self.options)

    def after_domain(self, context: Context) -> None:
        # Once and at the end: several epochs count no more than one, and what is drawn is of earlier domains.
        self.buffer.offer(context.domain.index, len(context.data.records), context.rng)

    def drawn(self, step: Step, count: int | None = None) -> list[tuple[int, int]]:
        """Draw references for this micro-batch (in `around_step`: this process), maybe none.

        All of a step are `count`; without one, as many as `ratio` asks for, at least one.
        """
        if count is None:
            count = max(1, round(self.options.ratio * step.records))
        return [self.buffer.references[place] for place in step.drawn(len(self.buffer), count)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"buffer": self.buffer.state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.buffer = Reservoir(self.options.buffer)
        if state:
            self.buffer.load(state["buffer"])
