"""Rank, barrier, reduce, gather: the bottom rung of every distributed step. One process is the identity.

Knows no model and no run. The process group is opened by `process_group`, which also closes it: a gloo group left open
aborts the interpreter at exit.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 10  # times as long as within a training a process waits for one that works for all


def rank() -> int:
    """Give the index of this process among all processes of the run."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Count the processes of the run, as the launcher (`torchrun`, `deepspeed`, `accelerate`) set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return rank() == 0


def device() -> str:
    """Name the device of this process: its own GPU where there is one, else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def free_bytes() -> int:
    """Measure what is free on this process's GPU, or else its share of the memory available on the host."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch holds back is free, whatever ran before
        return torch.cuda.mem_get_info(device())[0]
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_cached_memory() -> None:
    """Give back what torch holds of a device's memory without using it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def process_group(timeout_s: int = 600, deepspeed: bool = False) -> Iterator[None]:
    """Open the process group for the time of a run; a single process without DeepSpeed needs none.

    DeepSpeed has to open the group itself, before `TrainingArguments` exists: otherwise its batch arithmetic is
    done for one process. After an exception in one of several processes the group is left open: to close it may take
    as long as the others wait for this one.

    Args:
        timeout_s: longest wait for the others inside of `keeping_step`; outside it is `PATIENCE` times as long.
        deepspeed: whether the run uses it.
    """
    import torch

    if "RANK" not in os.environ:  # no launcher: one process means one GPU, never torch's DataParallel over all
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if world_size() == 1 and not deepspeed:
        yield
        return
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device())
    alone = {}
    if "RANK" not in os.environ:  # DeepSpeed wants a rendezvous even for one process that no launcher started
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        alone |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(alone)
    timeout, ended = timedelta(seconds=PATIENCE * timeout_s), False
    try:
        if deepspeed:
            import deepspeed as ds

            if backend == "gloo":  # else DeepSpeed compiles its own shared-memory all-reduce first: minutes of C++
                ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            ds.init_distributed(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
        yield
        dist.barrier()
        ended = True
    finally:
        if dist.is_initialized() and (ended or world_size() == 1):
            dist.destroy_process_group()
        for name in alone:
            del os.environ[name]


@contextmanager
def keeping_step(timeout_s: int) -> Iterator[None]:
    """Take a wait of `timeout_s` for the others as a failure, in a block where all work at one pace."""
    _limit_waits(timeout_s)
    yield
    _limit_waits(PATIENCE * timeout_s)


def _limit_waits(seconds: int) -> None:
    if world_size() > 1:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        limit = dist.set_timeout if hasattr(dist, "set_timeout") else c10d._set_pg_timeout  # new in torch 2.14
        for group in list(c10d._world.pg_map):  # DeepSpeed has groups of its own
            limit(timedelta(seconds=seconds), group)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_reduce(tensors: Iterable[Any]) -> None:
    """Sum each tensor over all processes, in place and in the given order; NCCL reduces host tensors via the GPU."""
    if world_size() > 1:
        import torch.distributed as dist

        via_gpu = dist.get_backend() == "nccl"
        for tensor in tensors:
            moved = (tensor.to(device()) if via_gpu else tensor).contiguous()  # memory is summed, whatever the strides
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)


def largest(number: int) -> int:
    """Give the largest of all processes' numbers."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    value = torch.tensor(number, device=device() if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def share_of(tensor: Any) -> Any:
    """Cut this process's share of a tensor's entries, flat; shares of all processes are equally long."""
    import torch

    length = -(-tensor.numel() // world_size())
    padded = torch.nn.functional.pad(tensor.flatten(), (0, length * world_size() - tensor.numel()))
    return padded[rank() * length : (rank() + 1) * length].clone()


def whole_of(share: Any, shape: tuple[int, ...]) -> Any:
    """Put together the tensor whose shares all processes hold."""
    import torch
    import torch.distributed as dist

    moved = share.to(device()) if dist.get_backend() == "nccl" else share
    parts = [torch.empty_like(moved) for _ in range(world_size())]
    dist.all_gather(parts, moved)
    return torch.cat(parts)[: math.prod(shape)].view(shape).to(share.device)


def gather(value: Any) -> list[Any]:
    """Give every process's value, in rank order, to every process."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def interleaved(rows: Any) -> Any:
    """Join rows (n, ...) of all processes in the order of items, dealt out one to each in turn."""
    shares = gather(rows)
    whole = rows.new_zeros(sum(map(len, shares)), *rows.shape[1:])
    for place, share in enumerate(shares):
        whole[place :: len(shares)] = share
    return whole


def dealt_back(shares: Sequence[Sequence[T]]) -> list[T]:
    """Join what was dealt out, one item to each process in turn."""
    whole: list[Any] = [None] * sum(map(len, shares))
    for place, share in enumerate(shares):
        whole[place :: len(shares)] = share
    return whole


def from_main(value: Any) -> Any:
    """Give the main process's value to every process."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def main_first(work: Callable[[], T]) -> T:
    """Run `work` in the main process, then in the others; an error of the main process is raised in all."""
    result, error = None, None
    if is_main():
        try:
            result = work()
        except Exception as failure:  # raised below, in every process
            error = failure
    error = from_main(error)
    if error is not None:
        raise error
    return result if is_main() else work()
