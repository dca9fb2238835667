"""Weights that ZeRO-3 divides over processes: whole for a moment, or block by block in passes outside a training.

DeepSpeed fetches weights only inside its training engine. What runs outside of it (probes, answers, merges) goes
through here. All of it is collective: every process takes the same steps in the same order. Where nothing is
partitioned all of it does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_keeplora.models.running import removed_afterwards
from mllm_keeplora.system import distributed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

SHARE_OF_FREE = 0.5  # that whole weights may take during an evaluation


class IdleBatch(dict):
    """A batch that a process runs only to keep step with the others; nothing of it is counted."""


def is_partitioned(model: Module) -> bool:
    """Whether ZeRO-3 divides the model's weights over processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shape_of(parameter: Parameter) -> tuple[int, ...]:
    """Give the shape of the whole parameter, here or divided."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def whole(parameters: Iterable[Parameter], edited: bool = False) -> Iterator[None]:
    """Bring all values of parameters here; if `edited`, what the main process made of them is what stays."""
    divided = [each for each in parameters if hasattr(each, "ds_id")]
    if not divided:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(divided, modifier_rank=0 if edited else None):
        yield


def copy_of(parameter: Parameter) -> Tensor:
    """Copy all values of a parameter."""
    with whole([parameter]):
        return parameter.detach().clone()


def assign(parameter: Parameter, values: Tensor) -> None:
    """Set all values of a parameter, cast to its dtype; every process must give the same."""
    with whole([parameter], edited=True):
        parameter.data.copy_(values)


@contextmanager
def answering(model: Module, weights: str) -> Iterator[None]:
    """Have whole weights on every process for an evaluation, or divided ones that are fetched block by block.

    `weights` is `gathered`, `divided`, or `auto`: gathered where they take less than half of the free memory.
    """
    if weights == "auto":
        size = sum(math.prod(shape_of(each)) * each.element_size() for each in model.parameters())
        is_small = size < SHARE_OF_FREE * distributed.free_bytes()
        weights = distributed.from_main("gathered" if is_small else "divided")
    with whole(model.parameters()) if weights == "gathered" else streamed(model):
        yield


def keeps_step(model: Module) -> bool:
    """Whether a forward pass needs every process at once: weights are divided and not here."""
    return any(hasattr(each, "ds_id") and each.numel() == 0 for each in model.parameters())


class SavedParameter:
    """Values of a parameter as they are now; where ZeRO-3 divides it, each process keeps its share alone."""

    def __init__(self, parameter: Parameter):
        self.shape, self.is_divided = shape_of(parameter), hasattr(parameter, "ds_id")
        values = copy_of(parameter)
        self.values = distributed.share_of(values) if self.is_divided else values

    def whole(self) -> Tensor:
        return distributed.whole_of(self.values, self.shape) if self.is_divided else self.values


@contextmanager
def streamed(model: Module) -> Iterator[None]:
    """Let a model run forward and backward outside a training: each block's weights are fetched when it runs.

    One block is whole at a time, beside the few parameters that belong to none. No gradient of a weight is computed.
    Within another `streamed` it does nothing.
    """
    if _Running.now or not keeps_step(model):
        yield
        return
    blocks, loose = _divided(model)
    running = _Running()
    handles = [block.register_forward_pre_hook(running.fetch) for block in blocks]
    handles += [block.register_forward_hook(running.leave) for block in blocks]
    _Running.now = True
    try:
        with removed_afterwards(handles), whole(loose):
            yield
    finally:
        _Running.now = False
        running.release()


class _Running:
    """The block whose weights are here, and the way to the next."""

    now: ClassVar[bool] = False  # whether a model is streamed

    def __init__(self) -> None:
        self.block: Module | None = None
        self.held = ExitStack()

    def fetch(self, block: Module, *_: Any) -> None:
        if self.block is block:
            return
        self.release()
        self.held.enter_context(whole(block.parameters()))
        self.block = block

    def leave(self, block: Module, args: tuple, output: Any) -> None:
        """Before the block's backward pass its weights are fetched again: when its output's gradient is known."""
        from torch.utils._pytree import tree_leaves

        for tensor in tree_leaves(output):
            if getattr(tensor, "requires_grad", False) and tensor.grad_fn is not None:
                tensor.register_hook(lambda _, block=block: self.fetch(block))

    def release(self) -> None:
        self.block = None
        self.held.close()


def _divided(module: Module) -> tuple[list[Module], list[Parameter]]:
    """A model as blocks that each run as a whole, and the parameters beside them that belong to no block.

    A block is a member of a list of modules, or a module with weights of its own and no list below it.
    """
    from torch.nn import ModuleList

    blocks: list[Module] = []
    loose = list(module.parameters(recurse=False))
    for child in module.children():
        has_own = any(True for _ in child.parameters(recurse=False))
        if isinstance(child, ModuleList):
            blocks.extend(child)
        elif any(isinstance(each, ModuleList) for each in child.modules()) or not has_own:
            inner, beside = _divided(child)
            blocks.extend(inner)
            loose.extend(beside)
        else:
            blocks.append(child)
    return blocks, loose
