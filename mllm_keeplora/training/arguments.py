"""What a run's training settings are to the Trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.errors import UserError, first_line
from mllm_keeplora.system import distributed


def training_arguments(
    settings: TrainConfig, epochs: float, folder: Path, seed: int, deepspeed: str | None, bf16: bool
) -> TrainingArguments:
    """Make the Trainer's arguments; `batch_size` is global, so the number of processes never changes the result.

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
    workers = settings.workers
    if workers is None:  # a GPU would wait for pictures that are not read ahead
        workers = 4 if torch.cuda.is_available() else 0
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
        "dataloader_num_workers": workers,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps,
        "save_total_limit": 2,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": settings.on_nonfinite != "stop",  # a step that is left out has no part in the mean
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


def rehearse(settings: TrainConfig) -> None:
    """Have the Trainer begin a training of one number, so that what it refuses of the settings is told first.

    Raises:
        UserError: the Trainer, or what it makes of the arguments (an optimizer, a kernel), refuses them.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer
    from transformers.integrations.liger import apply_liger_kernel

    with tempfile.TemporaryDirectory() as folder:
        quiet = settings.model_copy(update={"args": {**settings.args, "push_to_hub": False}})
        arguments = training_arguments(quiet, 1.0, Path(folder), 0, None, bf16=False)
        try:
            trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{}], data_collator=dict)
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            if arguments.use_liger_kernel:  # else it is asked for when the training starts
                apply_liger_kernel(trainer.model, arguments.liger_kernel_config)
        except Exception as error:  # of whatever library an argument leads to
            own = f"train.args {settings.args}, " if settings.args else ""
            raise UserError(
                f"{own}train.schedule {settings.schedule!r}: the Trainer refuses them: {first_line(error)}"
            ) from error
        finally:  # the run's own training starts with a state of its own
            AcceleratorState._reset_state()
            GradientState._reset_state()
