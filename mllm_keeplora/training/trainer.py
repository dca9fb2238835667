"""The Trainer of one domain: a strategy's hooks, and checkpoints of the trained parameters alone."""

from __future__ import annotations

import itertools
import math
import shutil
import traceback
from collections.abc import Generator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from mllm_keeplora.errors import UserError
from mllm_keeplora.models import IGNORED
from mllm_keeplora.models.family import Family, inputs_of
from mllm_keeplora.models.partition import assign, copy_of, is_partitioned
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.strategies.context import Context, Step
from mllm_keeplora.system import distributed, files
from mllm_keeplora.training.deepspeed import parameters_of
from mllm_keeplora.training.nonfinite import MEND, Guard
from mllm_keeplora.training.order import FilledSampler
from mllm_keeplora.training.schedule import ONE_CYCLE, one_cycle
from mllm_keeplora.training.state import STATE, WEIGHTS, complete_checkpoint, write_training_state


def answer_loss(
    family: Family, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Average the losses over all that one optimizer step sees: a scalar.

    Args:
        outputs: the model's, of what carries loss alone.
        num_items_in_batch: losses of the whole step; None for those of the micro-batch.
    """
    losses, _ = family.losses(outputs.logits, labels)
    count = max(len(losses), 1) if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / count


class DomainTrainer(Trainer):
    """Trains with a strategy's hooks, and writes checkpoints that hold the trained parameters only.

    Args:
        batch_size: records of a whole optimizer step, of all processes.
        lr_full: rate of the parameters that are trained in full; None for that of the others.
        loss_mean, schedule: as in `TrainConfig`.
        guard: deals with what is not finite.
    """

    def __init__(
        self,
        strategy: Strategy,
        context: Context,
        identity: dict[str, Any],
        batch_size: int,
        lr_full: float | None,
        guard: Guard,
        loss_mean: str = "tokens",
        schedule: str = "cosine",
        **arguments: Any,
    ):
        super().__init__(compute_loss_func=partial(answer_loss, context.base.family), **arguments)
        self.strategy = strategy
        self.context = context
        self.identity = identity
        self.batch_size = batch_size
        self.lr_full = lr_full
        self.guard = guard
        self.loss_mean = loss_mean
        self.schedule = schedule
        self.supervised = 1  # micro-batches of this step with anything that carries loss, of all processes
        self.tokens: torch.Tensor | None = None  # mean number of supervised tokens of this step's micro-batches
        self.before = parameters_of(context.branches)
        self.readers: Generator | None = None  # what gives micro-batches, read by processes of its own or not
        self.looked_at = 0  # micro-batches of this optimizer step whose loss is computed

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.context.branches.look_at(inputs)
        with self.context.base.family.supervised(self.context.branches.base, inputs):
            counted = num_items_in_batch if self.loss_mean == "tokens" else None
            given = {**inputs_of(inputs), "labels": inputs["labels"]}  # which the Trainer keeps for `answer_loss`
            loss, outputs = super().compute_loss(model, given, True, counted)
        if counted is None:  # a mean of its own, which the Trainer takes for scaled already and averages over processes
            loss = loss * distributed.world_size() / self.supervised
        step = self.step(self.looked_at, self.current_gradient_accumulation_steps)
        extra = self.strategy.extra_loss(self.context, inputs, outputs, step)
        self.looked_at += 1
        total = loss + extra / self.current_gradient_accumulation_steps
        if "pixel_values" not in inputs and not is_partitioned(self.context.branches.base):
            # Processes sum gradients up together, and a projector without pictures would have none: all get zero.
            total = total + 0.0 * sum(each.sum() for each in self.context.branches.trainable().values())
        if total.ndim:
            name, shape = f"{type(self.strategy).__name__}.extra_loss", tuple(extra.shape)
            domain = self.context.domain.name
            raise RuntimeError(f"{name} must give one number, got shape {shape} in domain {domain}")
        if not torch.isfinite(total):
            what, mend = self._blame(loss, extra)
            if self.guard.stops:
                raise self.guard.end(what, self.state, mend)
            self.guard.seen = what
            total = total * math.nan  # so is the gradient then, which all processes see
        return (total, outputs) if return_outputs else total

    def step(self, number: int = 0, count: int = 1) -> Step:
        """Describe the optimizer step that is under way to one of its `count` micro-batches, or to the process."""
        records, done = len(self.context.data.records), self.state.global_step
        in_epoch = done % math.ceil(records / self.batch_size) * self.batch_size
        rank, world = distributed.rank(), distributed.world_size()
        share = number * world + rank, count * world
        left = min(self.batch_size, records - in_epoch)
        return Step(done, left, self.optimizer, self.tokens, self.context.seed, share)

    def _blame(self, loss: torch.Tensor, extra: Any) -> tuple[str, str]:
        """What is wrong with a loss that is not finite, and what may mend it."""
        if not torch.isfinite(loss):
            return f"the loss is {loss.item()}", MEND
        return (
            f"{type(self.strategy).__name__}.extra_loss is {float(extra)}",
            "lower train.lr or the weight of that loss",
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Take the micro-batches of one optimizer step; the strategy changes them before their tokens are counted."""
        # A run that goes on from the checkpoint of its last step would do one more, if that lies within an epoch.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        self.readers = epoch_iterator
        try:
            taken, self.tokens = list(itertools.islice(epoch_iterator, num_batches)), None
        except UserError as error:  # of a process that reads records, in the middle of a traceback
            raise UserError(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
        for number, batch in enumerate(taken):
            batch = self.strategy.batch(self.context, batch, self.step(number, len(taken)))
            if self.args.deepspeed is not None and "pixel_values" not in batch and self.idle_picture is not None:
                # ZeRO-2 sums gradients in the order in which a process's parameters receive theirs, so that a
                # projector must be reached in each. Batches of a sequence without pictures are left as they are.
                batch = self.context.data.joined(batch, self.idle_picture)
            taken[number] = batch
        self.looked_at = 0
        self.guard.begin_step(self._get_learning_rate())
        count = self._get_num_items_in_batch(taken, device)  # of all processes
        if self.loss_mean == "micro_batches":  # those that an epoch's end leaves to no process train nothing
            own = sum(bool((batch["labels"] != IGNORED).any()) for batch in taken)
            self.supervised = sum(distributed.gather(own))
        self.tokens = count / (len(taken) * distributed.world_size()) if taken else None
        return taken, count

    def end_readers(self, error: BaseException | None) -> None:
        """End the processes that read records, which wait for more: a signal would not end them (`Collator`)."""
        while error is not None:  # its frames hold them, too
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        if self.readers is not None:
            self.readers.close()

    @cached_property
    def idle_picture(self) -> dict[str, torch.Tensor] | None:
        """The model's inputs of an untrained record with a picture, of this domain or an earlier one."""
        data = self.context.data
        domains = map(data.of_domain, range(self.context.domain.index, -1, -1))
        first = next((record for records in domains for record in records if record.media), None)
        return None if first is None else data.inputs([first.untrained()])

    def _get_train_sampler(self, train_dataset=None):
        world = distributed.world_size()
        if world == 1:
            return super()._get_train_sampler(train_dataset)
        at_once = self.args.per_device_train_batch_size * world
        return FilledSampler(self.train_dataset, self.args.data_seed, at_once, lambda: int(self.state.epoch or 0))

    def create_optimizer(self, model=None):
        """Make AdamW over the trained parameters; those trained in full may have a rate of their own."""
        if self.optimizer is None:
            cls, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups: dict[float, list] = {}
            for name, parameter in self.context.branches.trainable().items():
                own = self.lr_full if self.context.branches.is_full(name) else None
                rate = (own or self.args.learning_rate) * self.context.branches.rate_of(name)
                groups.setdefault(rate, []).append(parameter)
            decay = self.args.weight_decay
            self.optimizer = cls([{"params": p, "lr": r, "weight_decay": decay} for r, p in groups.items()], **keywords)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Make the schedule of the rate over all steps of the training, those done before it was continued included."""
        if self.lr_scheduler is None and self.schedule == ONE_CYCLE:
            options = self.args.lr_scheduler_kwargs
            self.lr_scheduler = one_cycle(optimizer or self.optimizer, num_training_steps, options)
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model):
        gradients = (each.grad for each in self.context.branches.trainable().values() if each.grad is not None)
        if self.guard.stops or all(each.isfinite().all() for each in gradients):
            self.strategy.around_step(self.context, "grad", self.step())
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """Look at the gradient; a step that is left out has none, so that the optimizer does nothing."""
        norm = super()._get_grad_norm(model, grad_norm)
        skipped = self.args.deepspeed is not None and self.accelerator.optimizer_step_was_skipped
        is_finite = norm is None or 0 <= float(norm) < math.inf  # DeepSpeed has a -1
        if self.args.fp16 or (is_finite and not skipped):  # to float16 it happens, and its scaler sees to it
            return norm
        self.guard.leave_out(self.state)
        model.zero_grad()
        return None

    def keep_schedule(self) -> None:
        """Let the schedule of the rate go on by steps that were left out or passed over, too."""
        if self.guard.events and not isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            while self.lr_scheduler.last_epoch < self.state.global_step:
                self.lr_scheduler.step()

    def check_trained(self, trained: Mapping[str, torch.Tensor]) -> None:
        """Refuse factors that are not finite: no checkpoint has such, and no stage leaves them.

        Raises:
            Diverged: the run is to end.
            RolledBack: it goes on from the last checkpoint.
        """
        bad = [name for name, values in trained.items() if not values.isfinite().all()]
        if bad:
            what = f"{len(bad)} of {len(trained)} trained factors are not finite"
            self.guard.go_back(what, self.state, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained parameters alone; under DeepSpeed the Trainer would put the whole base together first."""
        self._save(output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        trained = {name: copy_of(parameter) for name, parameter in self.context.branches.trainable().items()}
        self.check_trained(trained)
        if self.args.should_save:
            files.write_tensors(Path(output_dir) / WEIGHTS, trained)
            write_training_state(self.strategy, Path(output_dir) / STATE)
            self.guard.save(Path(output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with files.written(folder):
                super()._save_checkpoint(model, trial)
                files.flush_all(folder)  # what this process has written
        except UserError:
            if self.args.should_save:  # half of it would go on taking room
                shutil.rmtree(folder, ignore_errors=True)
            raise
        distributed.barrier()
        if self.args.should_save:
            complete_checkpoint(folder, self.identity)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        stored = files.read_tensors(Path(resume_from_checkpoint) / WEIGHTS)
        for name, parameter in self.context.branches.trainable().items():
            assign(parameter, stored[name])
