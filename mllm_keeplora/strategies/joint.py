"""Joint training: all domains at once, an upper bound for Last; as many steps as the whole sequence has.

The branch is that of sequential LoRA.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.base import Context, Strategy
from mllm_keeplora.strategies.plain import fresh_branch


class Joint(Strategy):
    stream: ClassVar[Literal["union"]] = "union"

    def before_domain(self, context: Context) -> None:
        context.branches.open(fresh_branch(context, self.options))
