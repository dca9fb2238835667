"""Fit one domain with the Hugging Face Trainer (and DeepSpeed, where the run asks for it).

Only the parameters that the adapters declare are trained, saved in checkpoints and restored from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.config import TrainConfig
from mllm_keeplora.models.partition import copy_of
from mllm_keeplora.models.running import statistics_held
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.strategies.context import Context
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.training.deepspeed import exact_afterwards, release_from_engine, scalars_as_vectors
from mllm_keeplora.training.nonfinite import Guard, RolledBack
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
        Facts for the ledger: steps, mean loss, trained parameters, and what was done about numbers that are not finite.

    Raises:
        Diverged: loss, gradient or trained factors are not finite.
        RolledBack: the training is to be begun again; it then goes on from a checkpoint that was written for it.
        Stopped: the run is to end; a checkpoint of the last optimizer step is there.
    """
    branches, folder = context.branches, Path(arguments.output_dir)
    row = {"domain_index": context.domain.index, "stage": "train"}
    per_epoch = math.ceil(len(context.data.records) / settings.batch_size)
    told = (metrics_file, row, settings.lr)
    guard = Guard(settings.on_nonfinite, context.domain.name, per_epoch, folder, identity, *told)
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
        guard=guard,
        loss_mean=settings.loss_mean,
        schedule=settings.schedule,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = distributed.from_main(last_checkpoint(folder, identity))
    guard.resume(checkpoint)
    read_training_state(strategy, Path(checkpoint) / STATE if checkpoint else None)
    steps = math.ceil(len(context.data.records) / settings.batch_size * epochs)
    steps = arguments.max_steps if arguments.max_steps > 0 else steps
    bar, held = progress_bar(f"{context.domain.name}: train", steps), statistics_held(branches.model)
    with bar as advance, branches.plan_kept(), scalars_as_vectors(branches.model), held:
        reporter = Reporter(context, strategy, trainer, metrics_file, advance)
        trainer.add_callback(reporter)
        try:
            outcome = trainer.train(resume_from_checkpoint=checkpoint)
            if not reporter.stopped:
                trainer.check_trained({name: copy_of(each) for name, each in branches.trainable().items()})
        except BaseException as error:
            trainer.end_readers(error)
            if isinstance(error, RolledBack):
                _release(trainer, branches)
            raise
    trainer.end_readers(None)  # a training that was told to stop leaves them in the middle of an epoch
    if reporter.stopped:
        distributed.barrier()  # no process leaves before the checkpoint is whole
        watch.stop_saved()
    facts = {
        "steps": outcome.global_step,
        "loss": outcome.training_loss,
        "trained_parameters": sum(parameter.numel() for parameter in branches.trainable().values()),
    }
    if guard.events:
        facts["nonfinite"] = guard.events
    _release(trainer, branches)
    if settings.gradient_checkpointing:
        branches.base.gradient_checkpointing_disable()
    branches.base.eval()
    return facts


def _release(trainer: DomainTrainer, branches: Adapters) -> None:
    """Let nothing of the engine or the Trainer stay on the model."""
    with exact_afterwards(branches, trainer.before):
        trainer.accelerator.free_memory()
        release_from_engine(branches.model)


@dataclass(eq=False)
class Reporter(TrainerCallback):
    """Moves the bar, tells the strategy of steps, appends metrics, and ends a training that is to end.

    Attributes:
        context, strategy: of the domain.
        trainer: of the domain.
        metrics_file: gets JSON lines.
        advance: of the progress bar.
        stopped: whether the training was ended before its end.
    """

    context: Context
    strategy: Strategy
    trainer: DomainTrainer
    metrics_file: Path
    advance: Callable[..., None]
    stopped: bool = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.advance(state.global_step)
        self.trainer.keep_schedule()
        if self.trainer.guard.mode == "rollback" and state.global_step == 0:  # there is always one to go back to
            self.trainer._save_checkpoint(self.trainer.model_wrapped, None)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not args.max_grad_norm:  # otherwise the strategy was asked before clipping
            self._ask("grad")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._ask("post")

    def _ask(self, phase: Literal["grad", "post"]) -> None:
        if not self.trainer.guard.left_out:
            self.strategy.around_step(self.context, phase, self.trainer.step())

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()
        self.trainer.keep_schedule()
        if watch.stop_agreed():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self.advance(0, note=f"loss {logs['loss']:.3f}")
        row = {"domain_index": self.context.domain.index, "stage": "train", "optimizer_step": state.global_step, **logs}
        row.pop("epoch", None)
        files.append_line(self.metrics_file, files.one_line(row).rstrip())
