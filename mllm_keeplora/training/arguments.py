"""What a run's training settings are to the Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mllm_keeplora.config import TrainConfig
from mllm_keeplora.errors import UserError, first_line, known, several, shortened
from mllm_keeplora.system import distributed
from mllm_keeplora.training.schedule import ONE_CYCLE, SCHEDULES, one_cycle

OWNED = {  # arguments of the Trainer that `train.args` may not set -> the key to use instead, or why there is none
    "output_dir": "use output",
    "*train_batch_size": "use train.batch_size and train.micro_batch_size",
    "gradient_accumulation_steps": "use train.batch_size and train.micro_batch_size",
    "auto_find_batch_size": "use train.micro_batch_size",
    "num_train_epochs": "use train.epochs",
    "learning_rate": "use train.lr",
    "lr_scheduler_type": "use train.schedule",
    "weight_decay": "use train.weight_decay",
    "max_grad_norm": "use train.max_grad_norm",
    "gradient_checkpointing*": "use train.gradient_checkpointing",
    "activation_checkpointing*": "use train.gradient_checkpointing",
    "average_tokens_across_devices": "use train.loss_mean",
    "label_smoothing_factor": "the loss is the base's, which has none",
    "bf16": "use base.dtype",
    "fp16": "use base.dtype",
    "use_cpu": "hide the GPUs from the run by CUDA_VISIBLE_DEVICES",
    "logging_steps": "use train.log_steps",
    "eval_on_start": "nothing is evaluated within a training; eval says how sets are asked",
    "save_steps": "use train.checkpoint_steps",
    "save_only_model": "a stopped training could not go on from other checkpoints",
    "save_total_limit": "a stopped training could not go on from fewer checkpoints",
    "save_on_each_node": "processes share the run directory",
    "enable_jit_checkpoint": "a signal makes a run save and stop as it is",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint",
    "restore_callback_states_from_checkpoint": "the same command goes on from the last checkpoint",
    "ignore_data_skip": "a training that goes on would see other records than one that was not stopped",
    "*hub*": "a training uploads nothing; export writes what may be uploaded",
    "seed": "use seed",
    "data_seed": "use seed",
    "accelerator_config": "use train.batch_size, train.micro_batch_size and deepspeed",
    "parallelism_config": "use deepspeed",
    "deepspeed": "use deepspeed",
    "fsdp*": "the Trainer refuses it beside the sequence's own distributed training; use deepspeed",
    "ddp_backend": "processes have met before a training starts",
    "ddp_timeout": "use distributed_timeout_s",
    "local_rank": "the launcher says it",
    "dataloader_num_workers": "use train.workers",
    "dataloader_drop_last": "every record is learnt from",
    "dataloader_in_order": "a run with one seed sees its records in one order",
    "train_sampling_strategy": "a run with one seed sees its records in one order",
    "remove_unused_columns": "records are made into batches by the base's family",
    "label_names": "records are made into batches by the base's family",
}


def training_arguments(
    settings: TrainConfig, epochs: float, folder: Path, seed: int, deepspeed: str | None, bf16: bool
) -> TrainingArguments:
    """Make the Trainer's arguments; `batch_size` is global, so the number of processes never changes the result.

    Raises:
        UserError: the batch does not divide over processes and micro-batches, there is no such schedule, or
            `train.args` has what the sequence sets itself, or no such field.
    """
    faults = list(_owned(settings.args))
    if settings.schedule not in SCHEDULES:
        faults.append(f"train.schedule {shortened(repr(settings.schedule))} is unknown; known: {known(SCHEDULES)}")
    if faults:
        raise several(faults)
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
        "lr_scheduler_type": settings.schedule if settings.schedule != ONE_CYCLE else "constant",  # made by itself
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
    if arguments.device.type == "cpu":  # transformers before 5.13 reads checkpoints to "cpu:0", which torch refuses
        arguments._setup_devices = torch.device("cpu")
    return arguments


def _owned(args: dict[str, Any]) -> Iterator[str]:
    """Say which arguments a user may not set, and what to use instead."""
    for name, value in args.items():
        instead = next((why for pattern, why in OWNED.items() if fnmatchcase(name, pattern)), None)
        if instead is not None:
            yield f"train.args.{name} is {value!r}, but the sequence itself sets that: {instead}"
    reporters = args.get("report_to")
    if "all" in ([reporters] if isinstance(reporters, str) else reporters or ()):
        yield "train.args.report_to is 'all', which tells whatever is installed; name those that shall be told"


def rehearse(settings: TrainConfig) -> None:
    """Have the Trainer begin a training of one number, so that what it refuses of the settings is told first.

    Raises:
        UserError: the Trainer, or what it makes of the arguments (an optimizer, a kernel), refuses them.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer
    from transformers.integrations.liger import apply_liger_kernel

    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(settings, 1.0, Path(folder), 0, None, bf16=False)
        try:
            trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{}], data_collator=dict)
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            if settings.schedule == ONE_CYCLE:
                one_cycle(trainer.optimizer, 1, arguments.lr_scheduler_kwargs)
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
