"""Sequential LoRA: each domain trains a fresh low-rank branch, A and B, which is then merged. Nothing is kept.

The lower bound of every comparison (LoRA-FT, SeqLoRA). A starts as peft starts it (uniform Kaiming), B at zero.
"""

from __future__ import annotations

import math

from mllm_keeplora.strategies.base import Context, Strategy


class Finetune(Strategy):
    def before_domain(self, context: Context) -> None:
        import torch

        from mllm_keeplora.adapters import Branch

        A = {}
        for layer in context.target_layers:
            d_in = context.d_in(layer)
            bound = 1 / math.sqrt(d_in)
            A[layer] = (torch.rand(self.options.rank, d_in, generator=context.rng) * 2 - 1) * bound
        context.branches.open(Branch(A, dict.fromkeys(A, self.options.alpha), train=("A", "B")))
