"""Fit one domain with the Hugging Face Trainer (and DeepSpeed, where the run asks for it).

Only the parameters that the adapters declare are trained, saved in checkpoints and restored from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.strategies.context import Context, Step
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.training.deepspeed import exact_afterwards, release_from_engine
from mllm_keeplora.training.order import TrainingRecords
from mllm_keeplora.training.state import STATE, last_checkpoint, read_training_state
from mllm_keeplora.training.trainer import DomainTrainer


def fit_domain(
    strategy: Strategy,
    context: Context,
    settings: TrainConfig,
    epochs: float,
    arguments: TrainingArguments,
    metrics_file: Path,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Train the open branch on the context's records, on from the last whole checkpoint of the same identity.

    Args:
        metrics_file: JSON lines of loss, rate and gradient norm are appended here.
        identity: facts that a checkpoint must share to be continued.

    Returns:
        Facts for the ledger: steps, mean loss, trained parameters.

    Raises:
        RuntimeError: the loss is not finite.
        Stopped: the run is to end; a checkpoint of the last optimizer step is there.
    """
    branches = context.branches
    trainer = DomainTrainer(
        strategy=strategy,
        context=context,
        identity=identity,
        model=branches.model,
        args=arguments,
        train_dataset=TrainingRecords(context.data.records),
        data_collator=context.data.collate,
        batch_size=settings.batch_size,
        lr_full=settings.lr_projector,
        loss_mean=settings.loss_mean,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(Path(arguments.output_dir), identity)
    read_training_state(strategy, Path(checkpoint) / STATE if checkpoint else None)
    steps = math.ceil(len(context.data.records) / settings.batch_size * epochs)
    steps = arguments.max_steps if arguments.max_steps > 0 else steps
    with progress_bar(f"{context.domain.name}: train", steps) as advance, branches.plan_kept():
        reporter = Reporter(context, strategy, trainer.step, metrics_file, advance)
        trainer.add_callback(reporter)
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if reporter.stopped:
        distributed.barrier()  # no process leaves before the checkpoint is whole
        watch.stop_saved()
    facts = {
        "steps": outcome.global_step,
        "loss": outcome.training_loss,
        "trained_parameters": sum(parameter.numel() for parameter in branches.trainable().values()),
    }
    # Nothing of the engine or the Trainer stays on the model.
    with exact_afterwards(branches, trainer.before):
        trainer.accelerator.free_memory()
        release_from_engine(branches.model)
    if settings.gradient_checkpointing:
        branches.base.gradient_checkpointing_disable()
    branches.base.eval()
    return facts


@dataclass(eq=False)
class Reporter(TrainerCallback):
    """Moves the bar, tells the strategy of steps, appends metrics, and ends a training that is to end.

    Attributes:
        context, strategy: of the domain.
        step: gives the optimizer step that is under way.
        metrics_file: gets JSON lines.
        advance: of the progress bar.
        stopped: whether the training was ended before its end.
    """

    context: Context
    strategy: Strategy
    step: Callable[[], Step]
    metrics_file: Path
    advance: Callable[..., None]
    stopped: bool = False

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
        row.pop("epoch", None)
        files.append_line(self.metrics_file, files.one_line(row).rstrip())
