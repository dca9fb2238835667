"""Troubles of a run that its user can mend: what ran out, what has ended, and which setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_keeplora.checks.run import Checked, memory_of
from mllm_keeplora.config import RunConfig
from mllm_keeplora.errors import Diverged, UserError, first_line, is_out_of_memory
from mllm_keeplora.linalg.checks import NotFinite
from mllm_keeplora.system import distributed, watch

GB = 1e9
OF_READERS = "DataLoader worker"


@contextmanager
def trouble_told(config: RunConfig, checked: Checked) -> Iterator[None]:
    """Say in one sentence what ends a stage: too little memory, killed readers, numbers that are not finite.

    Raises:
        UserError: it names the stage and what to change.
        Diverged: features or gradients of a data pass are not finite.
    """
    try:
        yield
    except UserError:
        raise
    except NotFinite as error:
        mend = "lower train.lr or look at the data"
        raise Diverged(f"stage {watch.stage()}: {error}; {mend}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(_without_memory(watch.stage(), first_line(error), config, checked)) from error
        if OF_READERS in str(error) and isinstance(error, RuntimeError):
            told = f"a process that reads records has ended ({first_line(error)}), most often for want of memory"
            raise UserError(f"stage {watch.stage()}: {told}; lower train.workers (0 reads in the run's own)") from error
        raise


def _without_memory(stage: str, said: str, config: RunConfig, checked: Checked) -> str:
    """Say what a stage was expected to take, and what it takes with other settings, by the estimate of `check`."""
    kind = stage.split("/")[1] if "/" in stage else stage
    expected = _expected(kind, config, checked)
    before = f"; `check` expects {expected / GB:.2f} GB there" if expected is not None else ""
    less = []
    for section, key, value in _remedies(kind, config):
        part = getattr(config, section).model_copy(update={key: value})
        takes = _expected(kind, config.model_copy(update={section: part}), checked)
        if takes is None or expected is None:
            less.append(f"{section}.{key}={str(value).lower()}")
        elif takes < expected:
            less.append(f"{section}.{key}={str(value).lower()} ({takes / GB:.2f} GB)")
    change = f"less is taken with {' or '.join(less)}" if less else "less is taken with deepspeed=zero3 on several GPUs"
    return f"out of memory in stage {stage} ({said}){before}; {change}, and the same command goes on with that"


def _remedies(kind: str, config: RunConfig) -> list[tuple[str, str, Any]]:
    """Settings that cannot change results: section, key and a value that takes less."""
    train, found = config.train, []
    if kind == "train":
        micro = train.micro_batch_size or train.batch_size // distributed.world_size()
        if micro > 1:
            found.append(("train", "micro_batch_size", next(n for n in range(micro // 2, 0, -1) if micro % n == 0)))
        if not train.gradient_checkpointing:
            found.append(("train", "gradient_checkpointing", True))
    elif kind in ("gradient", "consolidate", "prepare", "diagnose") and train.probe_batch_size > 1:
        found.append(("train", "probe_batch_size", train.probe_batch_size // 2))
    elif kind == "evaluate" and config.eval.batch_size > 1:
        found.append(("eval", "batch_size", config.eval.batch_size // 2))
    return found


def _expected(kind: str, config: RunConfig, checked: Checked) -> float | None:
    memory = memory_of(config, checked)
    return sum(memory.stages[kind].values()) if memory is not None and kind in memory.stages else None
