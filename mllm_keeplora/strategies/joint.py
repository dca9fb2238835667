"""Joint training: all domains at once, the upper bound. Same branch as sequential LoRA, matched number of steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.finetune import Finetune


class Joint(Finetune):
    stream: ClassVar[Literal["union"]] = "union"
