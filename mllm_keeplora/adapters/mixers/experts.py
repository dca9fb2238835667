"""A dense mixture of experts: equal shares of one branch, weighed token by token by a router in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from mllm_keeplora.adapters.mixers.mixing import Mixer, module_name


class Experts(Mixer):
    """Softmax routers, trained with the branch.

    Args:
        experts: shares that the branch's rank is divided into.
        inputs: target layer -> d_in.
    """

    kind = "experts"

    def __init__(self, experts: int, inputs: dict[str, int]):
        super().__init__()
        self.shares = experts
        self.inputs = dict(inputs)
        self.routers = nn.ModuleDict()
        for layer, d_in in inputs.items():
            router = skip_init(nn.Linear, d_in, experts, bias=False)  # nothing is drawn: what comes next stays the same
            self.routers[module_name(layer)] = router
            nn.init.zeros_(router.weight)

    def settings(self) -> dict[str, Any]:
        return {"experts": self.shares, "inputs": self.inputs}

    def router(self, layer: str) -> nn.Linear:
        """Give the router (experts, d_in) of a target layer."""
        return self.routers[module_name(layer)]

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> None:
        """Find nothing for the question as a whole: every token has weights of its own."""

    def of(self, layer: str, x: Tensor) -> Tensor:
        """Give weights (..., experts) that sum to one; x is what `lora_A` gets, LoRA dropout applied."""
        router = self.router(layer)
        return torch.softmax(router(x.to(router.weight.dtype)).float(), dim=-1)
