"""Fair measuring: two pieces of work in turn, medians of ratios; and the most bytes that tensors took meanwhile."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Timing:
    """Median seconds of both and the median of the ratios of neighbouring runs (below 1: ours is faster)."""

    ours: float
    reference: float
    ratio: float


def side_by_side(ours: Callable[[], Any], reference: Callable[[], Any], repeats: int) -> Timing:
    """Run both in turn, once each unmeasured first, then `repeats` times each in changing order."""
    ours(), reference()
    pairs = []
    for turn in range(repeats):
        order = (ours, reference) if turn % 2 == 0 else (reference, ours)
        seconds = {work: _seconds(work) for work in order}
        pairs.append((seconds[ours], seconds[reference]))
    ratio = statistics.median(mine / other for mine, other in pairs)
    return Timing(*(statistics.median(each) for each in zip(*pairs, strict=True)), ratio)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class PeakBytes(TorchDispatchMode):
    """Counts the storages of tensors that operations make; `peak` is the most that were alive at once.

    Work space inside a library call (LAPACK) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {each.untyped_storage()._cdata for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage(), inputs)
        return result

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in inputs:
            return
        self._known.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of new tensors alive at once during `work`."""
    with PeakBytes() as counter:
        work()
    return counter.peak
