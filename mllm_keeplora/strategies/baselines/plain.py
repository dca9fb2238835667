"""How a branch of plain LoRA begins, which most strategies share."""

from __future__ import annotations

import math
from dataclasses import replace

from mllm_keeplora.strategies.base import Branch, Context, StrategyOptions


def fresh_branch(context: Context, options: StrategyOptions) -> Branch:
    """Begin a branch as plain LoRA does: A uniform within 1 / sqrt(d_in), B zero, both trained."""
    import torch

    A = {}
    for layer in context.layers.names:
        d_in = context.layers.d_in(layer)
        A[layer] = (torch.rand(options.rank, d_in, generator=context.rng) * 2 - 1) * (1 / math.sqrt(d_in))
    return Branch(A, dict.fromkeys(A, options.alpha), train=("A", "B"))


def carried_branch(context: Context, options: StrategyOptions) -> Branch:
    """Give the branch of the domain before, to be trained on; a fresh one for the first domain."""
    if not context.branches.past:
        return replace(fresh_branch(context, options), carried=True)
    last = context.branches.past[-1]
    return Branch(last.A, last.alpha, ("A", "B"), last.B, carried=True)
