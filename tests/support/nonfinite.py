"""A plugin: sequential LoRA whose loss or gradient is not finite at chosen steps, in a chosen process alone."""

from __future__ import annotations

from typing import Literal

import torch

from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.system import distributed


class StumblingOptions(FinetuneOptions):
    at: tuple[int, ...] = ()  # optimizer steps of every domain
    by: Literal["loss", "gradient", "factors"] = "loss"
    rank_of: int = 0  # the process


class Stumbling(Finetune):
    """Train as sequential LoRA does, but for some steps."""

    Options = StumblingOptions

    def extra_loss(self, context, batch, outputs, step):
        options = self.options
        if step.number not in options.at or distributed.rank() != options.rank_of or options.by == "factors":
            return 0.0
        if options.by == "loss":
            return torch.tensor(float("nan"))
        parameter = next(iter(context.branches.trainable().values()))
        return (parameter * 0).sum().sqrt()  # zero, and its gradient is no number

    def around_step(self, context, phase, step):
        if self.options.by == "factors" and phase == "post" and step.number in self.options.at:
            next(iter(context.branches.trainable().values())).data.fill_(float("inf"))


STRATEGIES = {"stumbling": Stumbling}
