"""The schedule of the learning rate that transformers does not have: torch's one cycle."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import OneCycleLR
from transformers import SchedulerType

ONE_CYCLE = "one_cycle"
SCHEDULES = (*(each.value for each in SchedulerType), ONE_CYCLE)


def one_cycle(optimizer: Any, steps: int, options: dict[str, Any] | None = None) -> OneCycleLR:
    """Let every group's rate rise to its own within 30 % of the steps, and fall again.

    The optimizer's first momentum goes the other way: AdamW's beta 1 from 0.95 to 0.85 and back.

    Args:
        optimizer: of torch, or what an engine wraps around one; its groups have the rates of the peak.
        steps: of the whole training; the schedule refuses to go further.
        options: further arguments of torch's `OneCycleLR`, such as `pct_start` in place of the 30 %.

    Raises:
        ValueError, TypeError: the optimizer has no such momentum, or an option is none of torch's.
    """
    while not hasattr(optimizer, "defaults"):  # DeepSpeed's own around it do not say what momentum there is
        optimizer = optimizer.optimizer
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, peaks, total_steps=steps, **(options or {}))
