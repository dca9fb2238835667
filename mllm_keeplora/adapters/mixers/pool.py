"""Rank-1 experts of one branch in a training: a step uses those that its questions vote for, by a router in each layer.

Nothing of it is left when questions are answered: experts that were used most are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from mllm_keeplora.adapters.mixers.mixing import Mixer, module_name


class Pool(Mixer):
    """Masks of experts by layer: in a training those in use, else all of them.

    Args:
        experts, active: rank coordinates of the branch, and how many of them a step uses.
        inputs: target layer -> width of what its router sees.
        learns: whether the routers train, by the chances of what they chose (straight through).

    Attributes:
        masks: (layers, experts), those in use; None before the first vote.
        seen: where routers learn, what they see of the questions of each micro-batch of the step to come.
    """

    kind = "pool"
    in_training_alone: ClassVar[bool] = True

    def __init__(self, experts: int, active: int, inputs: dict[str, int], learns: bool = False):
        super().__init__()
        self.shares, self.active, self.inputs, self.learns = experts, active, dict(inputs), learns
        self.routers = nn.ModuleDict()
        for layer, width in inputs.items():
            router = skip_init(nn.Linear, width, experts)  # nothing is drawn: what comes next stays the same
            self.routers[module_name(layer)] = router.requires_grad_(learns)
            nn.init.zeros_(router.weight), nn.init.zeros_(router.bias)
        self.masks: Tensor | None = None
        self.seen: list[dict[str, Tensor]] = []
        self._rows = {layer: row for row, layer in enumerate(inputs)}
        self._chances: dict[str, Tensor] = {}
        self._is_silent = False

    def settings(self) -> dict[str, Any]:
        return {"experts": self.shares, "active": self.active, "inputs": self.inputs, "learns": self.learns}

    def begin(self, rng: torch.Generator) -> None:
        """Start all routers as plain linear layers: uniform within 1 / sqrt(inputs)."""
        for layer, width in self.inputs.items():
            for parameter in self.router(layer).parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=rng)

    def router(self, layer: str) -> nn.Linear:
        """Give the router (experts, width) of a target layer."""
        return self.routers[module_name(layer)]

    def logits(self, layer: str, features: Tensor) -> Tensor:
        """Give what a router says of questions' features (n, width): (n, experts) float32."""
        router = self.router(layer)
        return router(features.to(router.weight.dtype)).float()

    def votes(self, features: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Count votes, (layers, experts) int64: each question has one for each of its `active` likeliest experts.

        Args:
            features: layer -> those (n, width) of questions, and (n,) whether each has a vote.
        """
        found = torch.zeros(len(self.inputs), self.shares, dtype=torch.int64)
        with torch.no_grad():
            for layer, (given, may) in features.items():
                likeliest = self.logits(layer, given).topk(self.active).indices[may]
                found[self._rows[layer]] = likeliest.flatten().bincount(minlength=self.shares).cpu()
        return found

    def use(self, votes: Tensor) -> None:
        """Use the experts of each layer that have the most votes (layers, experts)."""
        device = next(self.parameters()).device
        self.masks = torch.zeros(votes.shape).scatter_(1, leading(votes, self.active), 1.0).to(device)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Let no expert take part for the time of a pass."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> None:
        """Find the chances of what a micro-batch's questions may choose, where routers learn; masks are of the step."""
        self._chances = {}
        if not self.learns or not self.training or self._is_silent:
            return
        # Behind the questions there may be a picture that was joined to them to keep step, and is not learnt. Routers
        # of layers that no question reaches are asked, too: in all processes they get their gradients in one order.
        seen, labels = self.seen.pop(0), batch["labels"]
        rows = len(labels) if labels.ndim > 1 else 0
        for layer, width in self.inputs.items():
            given = seen[layer] if layer in seen else torch.zeros(rows, width, device=labels.device)
            chances = self.logits(layer, given).softmax(dim=-1)
            self._chances[layer] = nn.functional.pad(chances, (0, 0, 0, max(0, rows - len(given))), value=1.0)

    def of(self, layer: str, x: Tensor) -> Tensor:
        if self._is_silent or not self.training:
            return torch.full((self.shares,), float(not self._is_silent), device=x.device)
        assert self.masks is not None, "a pool is asked before its first vote"
        mask = self.masks[self._rows[layer]]
        if not self.learns:
            return mask
        chances = self._chances[layer]
        return self._by_row(layer, x.shape[:-1], mask * (chances / chances.detach()))


def leading(counts: Tensor, number: int) -> Tensor:
    """Find the largest counts (layers, experts) of each layer, the first of equal ones: (layers, number), ascending."""
    experts = counts.shape[1]
    apart = counts * experts - torch.arange(experts)  # the same on every device and in every process
    return apart.topk(number, dim=1).indices.sort(dim=1).values
