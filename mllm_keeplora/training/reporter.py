"""What a training tells while it runs: steps to the strategy, loss to bar and file; and whether it is to end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from mllm_keeplora.strategies import Strategy
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.system import files, watch
from mllm_keeplora.training.context import RunContext


class Reporter(TrainerCallback):
    """Moves the bar, tells the strategy of steps, appends metrics.

    Args:
        context, strategy: of the domain.
        step: gives the optimizer step that is under way.
        metrics_file: gets JSON lines.
        advance: of the progress bar.
    """

    def __init__(
        self,
        context: RunContext,
        strategy: Strategy,
        step: Callable[[], Step],
        metrics_file: Path,
        advance: Callable[..., None],
    ):
        self.context = context
        self.strategy = strategy
        self.step = step
        self.metrics_file = metrics_file
        self.advance = advance
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.advance(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not args.max_grad_norm:  # otherwise the strategy was asked before clipping
            self.strategy.around_step(self.context, "grad", self.step())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.strategy.around_step(self.context, "post", self.step())

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()
        if watch.stop_agreed():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self.advance(0, note=f"loss {logs['loss']:.3f}")
        row = {"domain_index": self.context.domain.index, "stage": "train", "optimizer_step": state.global_step, **logs}
        with contextlib.suppress(KeyError):
            del row["epoch"]
        with open(self.metrics_file, "a", encoding="utf-8") as handle:
            handle.write(files.one_line(row))
