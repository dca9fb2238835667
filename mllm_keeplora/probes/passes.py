"""What every pass over records shares: mode, which layers count, sums over processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.partition import IdleBatch, streamed
from mllm_keeplora.models.running import evaluating
from mllm_keeplora.system import distributed

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.models.family import Family


@contextmanager
def looking(family: Family, model: Any) -> Iterator[None]:
    """Prepare for forward passes that are there for their layers' inputs alone."""
    import torch

    with torch.no_grad(), evaluating(model), family.passing(model), streamed(model):
        yield


def counted(layers: dict[str, Any], batch: dict) -> dict[str, Any]:
    """Give the layers whose statistics a batch goes into."""
    return {} if isinstance(batch, IdleBatch) else layers


def over_processes(statistic: Any) -> Any:
    """Sum a statistic over processes."""
    from mllm_keeplora.linalg import FrequentDirections, GradientRange

    if distributed.world_size() == 1:
        return statistic
    if isinstance(statistic, FrequentDirections):  # not linear: merged in rank order
        sketches = distributed.gather(statistic.to("cpu"))  # else all would come back on the first process's GPU
        whole = sketches[0].to(statistic.device)
        for other in sketches[1:]:
            whole.merge(other)
        return whole
    if isinstance(statistic, GradientRange):
        reach = statistic.reach()
        distributed.all_reduce([reach])
        statistic.turn(reach)  # to the range of all that the processes hold
    distributed.all_reduce(statistic.tensors())
    return statistic


def named(name: str, update: Any, *rows: Tensor) -> None:
    try:
        update(*rows)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None


def refuse_missing(missing: Collection[str], what: str) -> None:
    if missing:
        raise RuntimeError(f"{len(missing)} target layers {what}, first {min(missing)}")
