"""Gradients of several tasks that stop running against each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def without_conflicts(gradients: Sequence[Tensor], orders: Sequence[Sequence[int]]) -> list[Tensor]:
    """Take from each task's gradient what runs against the gradient of another task.

    Args:
        gradients: one of each task, all of one shape.
        orders: for each task the others in the order in which it meets them; a task without others keeps its own.

    Returns:
        A gradient for each task, the very tensor given where nothing ran against it.

    Source: PCGrad, as Ortho-LoRA (arXiv 2601.09684) applies it to each factor; references are never projected ones.
    """
    found = []
    for rest, order in zip(gradients, orders, strict=True):
        for other in order:
            product = (rest * gradients[other]).sum()
            if product < 0:
                rest = rest - product / gradients[other].square().sum() * gradients[other]
        found.append(rest)
    return found
