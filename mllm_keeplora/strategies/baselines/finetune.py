"""Sequential LoRA: a low-rank branch, A and B, fresh for each domain or trained on from one to the next.

The lower bound of every comparison. `carried` (LoRA-FT, SeqLoRA) trains the same pair on; `incremental` (IncLoRA) opens
a fresh branch for each domain, which is merged afterwards. A starts as peft starts it (uniform Kaiming), B at zero.
Source: the baselines of O-LoRA (arXiv 2310.14152) and of MCITlib (LoRA-FT).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.base import Branch, Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch, fresh_branch


class FinetuneOptions(StrategyOptions):
    branch: Literal["carried", "incremental"] = "incremental"


class Finetune(Strategy):
    """Stores the branch."""

    Options: ClassVar[type[StrategyOptions]] = FinetuneOptions
    options: FinetuneOptions

    def before_domain(self, context: Context) -> Branch:
        if self.options.branch == "carried":
            return carried_branch(context, self.options)
        return fresh_branch(context, self.options)
