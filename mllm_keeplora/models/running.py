"""A model's state for the time of a pass: mode, hooks, precision; all undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def removed_afterwards(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_for_a_while(model: Any) -> Iterator[None]:
    """Let no parameter require a gradient for the time of a pass."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: Any, checkpointing: bool = False) -> Iterator[None]:
    """Evaluation mode for the time of a pass; every module gets its own mode back.

    With `checkpointing` blocks that checkpoint their gradients go on to: they look at their own mode, and what is in
    them (dropout) at its own.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes if checkpointing else ():
        module.training = getattr(module, "gradient_checkpointing", False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def statistics_held(model: Any) -> Iterator[None]:
    """Keep batch norms in evaluation mode while a model trains, whoever calls `train()`.

    Else frozen towers of convolutions (ALIGN, MobileNets) would change: their means over batches are no parameters, so
    nothing stores what became of them, and a run that is read from its files would answer otherwise.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    held = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for module in held:
        module.eval()
        module.train = lambda mode=True, module=module: module  # hides the method
    try:
        yield
    finally:
        for module in held:
            del module.train


def as_in_training(model: Any) -> AbstractContextManager:
    """Run a model in half precision as the Trainer does, under autocast, which spares branches' float32 inputs."""
    import torch

    first = next(model.parameters())
    return torch.autocast(first.device.type, first.dtype, enabled=first.dtype.itemsize == 2)
