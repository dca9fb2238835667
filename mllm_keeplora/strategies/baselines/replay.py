"""Experience replay: every batch is joined by records of earlier domains out of a bounded buffer.

One low-rank branch is trained on from domain to domain. The buffer is a uniform sample of all records of the domains
finished so far (a reservoir of references); the loss is the mean over the answer tokens of new and buffered records
together, L = (sum of new + sum of buffered) / (tokens of both). It passes up to twice the records of other methods.
Source: Chaudhry et al. 2019 (arXiv 1902.10486), which takes as many buffered records as new ones at every step.
Departures from the published code (facebookresearch/agem): each domain's records are offered to the buffer once and
after the domain, so that several epochs count no more than one and only earlier domains are replayed; records are drawn
with replacement.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.strategies.base import Context, Step, StrategyOptions
from mllm_keeplora.strategies.baselines.buffered import Buffered, BufferOptions


class ReplayOptions(BufferOptions):
    """No size of the buffer is published for LLaVA; of text, TRACE keeps a tenth.

    The `ratio` of buffered to new records is 1 as published (10 and 10), which doubles what a micro-batch holds;
    `epoch` replays as many records in an epoch as the buffer has.

    The presets are LAMDA-CL/Prism's for LLaVA-1.5, `prism` on UCIT and `prism-coin` on CoIN. There each past domain has
    an equal part of the buffer, filled with records that training met first (seven of ten), and the buffer joins the
    training set; here it is a uniform sample, and each step gets its part.
    """

    ratio: Annotated[float, Field(gt=0.0)] | Literal["epoch"] = 1.0


class Replay(Buffered):
    """Stores the branch, and domain and number of each record in the buffer; the records stay where they are."""

    Options: ClassVar[type[StrategyOptions]] = ReplayOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "prism": {"rank": 48, "alpha": 96.0, "buffer": 180, "ratio": "epoch"},
        "prism-coin": {"rank": 64, "alpha": 128.0, "buffer": 180, "ratio": "epoch"},
    }
    joins_domains: ClassVar[bool] = True
    options: ReplayOptions

    def batch(self, context: Context, batch: dict[str, Any], step: Step) -> dict[str, Any]:
        """Join this micro-batch's part of the records that are replayed in the optimizer step; it may be none."""
        if not len(self.buffer):
            return batch
        chosen = self.drawn(step, self._part(step, len(context.data.records)))
        return context.data.joined(batch, context.data.batch_of(chosen)) if chosen else batch

    def _part(self, step: Step, records: int) -> int | None:
        """How many buffered records join a step where an epoch gets as many as the buffer has, on average."""
        if self.options.ratio != "epoch":
            return None
        expected = len(self.buffer) * step.records / records
        return int(expected + random.Random(f"part {step.seed} {step.number}").random())
