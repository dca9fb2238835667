"""Find linear layers of a model by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from mllm_keeplora.errors import UserError


def linears(model: Any, parent: str) -> tuple[str, ...]:
    """Name the linear layers within a module, but those that are never called: a fused function reads their weight."""
    import torch

    return tuple(
        f"{parent}.{name}" if name else parent
        for name, module in model.get_submodule(parent).named_modules()
        if isinstance(module, torch.nn.Linear)
        and not isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)  # of torch's attention
    )


def chosen(layers: tuple[str, ...], parent: str, target: Sequence[str], whole: bool = True) -> tuple[str, ...]:
    """Choose the layers that any of the names or patterns finds, in the model's order.

    Args:
        layers: to choose from.
        parent: module that they are in.
        target: the end of a dotted name, found in every block or not at all, or a pattern over whole names.
        whole: False lets a name be in some blocks only.

    Raises:
        UserError: a name or pattern finds nothing; a plain name finds layers in some blocks only.
    """
    found: set[str] = set()
    for wanted in target:
        own = [name for name in layers if matches(name, wanted)]
        if not own:
            ends = {part for name in layers for part in (name, name.rsplit(".", 1)[-1], ".".join(name.split(".")[-2:]))}
            near = get_close_matches(wanted, sorted(ends), 3, 0.4) or sorted(n for n in ends if "." not in n)
            raise UserError(f"adapters.target {wanted!r} is no linear layer of {parent}; near: {', '.join(near)}")
        blocks, holding = ({block_of(name, parent) for name in each} for each in (layers, own))
        if whole and not is_pattern(wanted) and wanted not in layers and holding != blocks:
            missing = sorted(blocks - holding, key=str)
            raise UserError(
                f"adapters.target {wanted!r} is in {len(holding)} of {len(blocks)} blocks of {parent} (not in "
                f"{', '.join(map(str, missing[:5]))}); say so by a pattern, e.g. '*.{wanted}'"
            )
        found.update(own)
    return tuple(name for name in layers if name in found)


def matches(layer: str, wanted: str) -> bool:
    """Tell whether a layer is meant by the end of a dotted name, or by a pattern over whole names."""
    return fnmatchcase(layer, wanted) if is_pattern(wanted) else layer == wanted or layer.endswith(f".{wanted}")


def is_pattern(wanted: str) -> bool:
    return any(mark in wanted for mark in "*?[")


def block_of(layer: str, parent: str) -> int | None:
    """Give the number of the block that a layer is in; None where its name has none."""
    numbers = [part for part in layer.removeprefix(parent).split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None
