"""Joint training: all domains at once, an upper bound for Last; as many steps as the whole sequence has.

The branch is that of sequential LoRA.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.finetune import Finetune


class Joint(Finetune):
    stream: ClassVar[Literal["union"]] = "union"
