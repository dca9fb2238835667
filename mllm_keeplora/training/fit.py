"""Fit one domain with the Hugging Face Trainer (and DeepSpeed, where the run asks for it).

Only the parameters that the adapters declare are trained, saved in checkpoints and restored from them.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.causal.logits import supervised_logits
from mllm_keeplora.models.causal.losses import token_losses
from mllm_keeplora.models.partition import assign, copy_of, is_partitioned
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.training.context import RunContext
from mllm_keeplora.training.deepspeed import exact_afterwards, parameters_of, release_from_engine
from mllm_keeplora.training.order import Collator, FilledSampler, Records
from mllm_keeplora.training.reporter import Reporter
from mllm_keeplora.training.state import COMPLETE, last_checkpoint, read_training_state, write_training_state

WEIGHTS, STATE = "trained.safetensors", "strategy.safetensors"


def fit_domain(
    strategy: Strategy,
    context: RunContext,
    settings: TrainConfig,
    epochs: float,
    arguments: TrainingArguments,
    metrics_file: Path,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Train the open branch on the context's records; continues from the last whole checkpoint of the same identity.

    Args:
        settings, epochs: the domain's training settings.
        arguments: from `training_arguments`.
        metrics_file: JSON lines of loss, rate and gradient norm are appended here.
        identity: facts that a checkpoint must share to be continued.

    Returns:
        Facts for the ledger: steps, mean loss, trained parameters.

    Raises:
        RuntimeError: the loss is not finite.
        Stopped: the run is to end; a checkpoint of the last optimizer step is there.
    """
    branches = context.branches
    context.full_batch = settings.batch_size
    trainer = DomainTrainer(
        strategy=strategy,
        context=context,
        identity=identity,
        model=branches.model,
        args=arguments,
        train_dataset=Records(context.records),
        data_collator=Collator(context.collator),
        compute_loss_func=answer_loss,
    )
    trainer.lr_full = settings.lr_projector
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(Path(arguments.output_dir), identity)
    read_training_state(strategy, Path(checkpoint) / STATE if checkpoint else None)
    steps = math.ceil(len(context.records) / settings.batch_size * epochs)
    with progress_bar(f"{context.domain.name}: train", steps) as advance, branches.plan_kept():
        reporter = Reporter(context, strategy, metrics_file, advance)
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
    with exact_afterwards(branches, trainer.before):
        trainer.accelerator.free_memory()
        release_from_engine(branches.model)
    if settings.gradient_checkpointing:
        branches.base.gradient_checkpointing_disable()
    branches.base.eval()
    return facts


def training_arguments(
    settings: TrainConfig, epochs: float, folder: Path, seed: int, deepspeed: str | None, bf16: bool
) -> TrainingArguments:
    """The Trainer's arguments; `batch_size` is global, so the number of processes never changes the result.

    Raises:
        UserError: the batch does not divide over processes and micro-batches, or `train.args` names no such field.
    """
    world = distributed.world_size()
    micro = settings.micro_batch_size or settings.batch_size // world
    if micro == 0 or settings.batch_size % (micro * world):
        raise UserError(
            f"train.batch_size {settings.batch_size} must be a multiple of micro_batch_size x processes = "
            f"{settings.micro_batch_size or 1} x {world}"
        )
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // (micro * world),
        "learning_rate": settings.lr,
        "num_train_epochs": epochs,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the frozen embeddings' output needs no gradient
        "dataloader_num_workers": _workers(settings),
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps,
        "save_total_limit": 2,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "data_seed": seed,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": deepspeed,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(**{**values, **settings.args})
    except (TypeError, ValueError) as error:
        raise UserError(f"train: the Trainer refuses its arguments: {error}") from error
    if arguments.n_gpu > 1:  # one process a GPU: several in one would multiply the batch
        arguments._n_gpu = 1
    return arguments


def _workers(settings: TrainConfig) -> int:
    """Processes that read records ahead; beside a GPU, which would wait for pictures, there are some by itself."""
    return settings.workers if settings.workers is not None else 4 if torch.cuda.is_available() else 0


def answer_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross entropy of the answers' tokens: their mean over all that one optimizer step sees."""
    losses = token_losses(outputs.logits, labels)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


class DomainTrainer(Trainer):
    """The Trainer with a strategy's hooks, and checkpoints that hold the trained parameters only."""

    def __init__(self, strategy: Strategy, context: RunContext, identity: dict[str, Any], **arguments: Any):
        super().__init__(**arguments)
        self.strategy = strategy
        self.context = context
        self.identity = identity
        self.lr_full: float | None = None
        self.before = parameters_of(context.branches)
        self.looked_at = 0  # micro-batches of this optimizer step whose loss is computed

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.context.branches.look_at(inputs)
        with supervised_logits(self.context.branches.base, inputs["labels"]):
            loss, outputs = super().compute_loss(model, {**inputs}, True, num_items_in_batch)
        with self.context.micro_batch(self.looked_at, self.current_gradient_accumulation_steps):
            extra = self.strategy.extra_loss(self.context, inputs, outputs)
        self.looked_at += 1
        total = loss + extra / self.current_gradient_accumulation_steps
        if "pixel_values" not in inputs and not is_partitioned(self.context.branches.base):
            total = total + self._reach_for_all()
        if total.ndim or not torch.isfinite(total):
            raise RuntimeError(self._blame(loss, extra))
        return (total, outputs) if return_outputs else total

    def _reach_for_all(self) -> torch.Tensor:
        """Zero, with a gradient of zero for all that trains: a projector is not reached by a batch without pictures.

        Processes sum gradients up together, and one that has none would not take part.
        """
        return 0.0 * sum(parameter.sum() for parameter in self.context.branches.trainable().values())

    def _blame(self, loss: torch.Tensor, extra: Any) -> str:
        """What is wrong with a loss that is no finite number."""
        where = f"in domain {self.context.domain.name}, optimizer step {self.state.global_step}"
        if not torch.isfinite(loss):
            return f"the loss is {loss.item()} {where}; lower train.lr or look at the data"
        name = f"{type(self.strategy).__name__}.extra_loss"
        if getattr(extra, "ndim", 0):
            return f"{name} must give one number, got shape {tuple(extra.shape)} {where}"
        return f"{name} is {float(extra)} {where}; lower train.lr or the weight of that loss"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, changed by the strategy before their tokens are counted.

        None where all steps are done, as after a checkpoint of the last one: the Trainer would do one more where that
        lies within an epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        taken = list(itertools.islice(epoch_iterator, num_batches))
        for number, batch in enumerate(taken):
            with self.context.micro_batch(number, len(taken)):
                taken[number] = self._pictured(self.strategy.batch(self.context, batch))
        self.looked_at = 0
        count = self._get_num_items_in_batch(taken, device)  # of all processes
        self.context.tokens_each = count / (len(taken) * distributed.world_size()) if taken else None
        return taken, count

    def _pictured(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Under DeepSpeed, a batch with a picture: where it has none, an idle record that has one is joined to it.

        ZeRO-2 sums gradients in the order in which a process's parameters receive theirs, so that a projector must be
        reached in each. Batches of a sequence without pictures are left as they are.
        """
        if self.args.deepspeed is None or "pixel_values" in batch or self.idle_picture is None:
            return batch
        return self.context.joined(batch, self.idle_picture)

    @cached_property
    def idle_picture(self) -> dict[str, torch.Tensor] | None:
        """Model inputs of a record with a picture, of this domain or an earlier one, of which nothing is learnt."""
        context = self.context
        domains = map(context.of_domain, range(context.domain.index, -1, -1))
        first = next((record for records in domains for record in records if record.media), None)
        if first is None:
            return None
        return {key: value.to(self.args.device) for key, value in context.collator([first.untrained()]).items()}

    def _get_train_sampler(self, train_dataset=None):
        world = distributed.world_size()
        if world == 1:
            return super()._get_train_sampler(train_dataset)
        at_once = self.args.per_device_train_batch_size * world
        return FilledSampler(self.train_dataset, self.args.data_seed, at_once, lambda: int(self.state.epoch or 0))

    def create_optimizer(self, model=None):
        """AdamW over the trained parameters; those trained in full may have a rate of their own."""
        if self.optimizer is None:
            cls, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups: dict[float, list] = {}
            for name, parameter in self.context.branches.trainable().items():
                is_full = self.context.branches.is_full(name)
                rate = (self.lr_full if is_full else None) or self.args.learning_rate
                rate *= self.context.branches.rate_of(name)
                groups.setdefault(rate, []).append(parameter)
            decay = self.args.weight_decay
            self.optimizer = cls([{"params": p, "lr": r, "weight_decay": decay} for r, p in groups.items()], **keywords)
        return self.optimizer

    def _clip_grad_norm(self, model):
        self.strategy.around_step(self.context, "grad")
        return super()._clip_grad_norm(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Without putting the whole base together first, as the Trainer would under DeepSpeed."""
        self._save(output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        trained = {name: copy_of(parameter) for name, parameter in self.context.branches.trainable().items()}
        if self.args.should_save:
            files.write_tensors(Path(output_dir) / WEIGHTS, trained)
            write_training_state(self.strategy, Path(output_dir) / STATE)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        distributed.barrier()
        if self.args.should_save:
            files.write_json(
                Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE, self.identity
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        stored = files.read_tensors(Path(resume_from_checkpoint) / WEIGHTS)
        for name, parameter in self.context.branches.trainable().items():
            assign(parameter, stored[name])
