"""One trained number for each unit's branch, shared by all layers, times a fixed one for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_keeplora.adapters.mixers.mixing import Mixer

if TYPE_CHECKING:
    from mllm_keeplora.adapters.stored import Past


class Magnitudes(Mixer):
    """Each branch's update of a layer counts magnitude times scale times.

    Args:
        layers, parts: exact names of the target layers, and number of branches, the open one last.
        rate: learning rate of the magnitudes as a multiple of the run's.

    Attributes:
        start: (parts,), the magnitudes as training begins; float32 whatever precision trained parameters have.
        moved: (parts,), trained, what they have become since. By itself it is as exact in bfloat16 as it is small.
        scales: (layers, parts), fixed; a branch whose scales are 0 takes no part.
    """

    kind = "magnitudes"

    def __init__(self, layers: Sequence[str], parts: int, rate: float = 1.0):
        super().__init__()
        self.layers, self.rate = list(layers), rate
        self.register_buffer("start", torch.ones(parts))
        self.moved = nn.Parameter(torch.zeros(parts))
        self.register_buffer("scales", torch.ones(len(self.layers), parts))
        self._rows = {layer: row for row, layer in enumerate(self.layers)}

    @property
    def magnitudes(self) -> Tensor:
        """The trained numbers as they are now, (parts,) float32."""
        return self.start + self.moved.float()

    def settings(self) -> dict[str, Any]:
        return {"layers": self.layers, "parts": len(self.start), "rate": self.rate}

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> None:
        """Find nothing: every question is answered alike."""

    def of(self, layer: str, x: Tensor) -> Tensor:
        return self.magnitudes * self.scales[self._rows[layer]]

    def summed(self, past: Past) -> Past:
        """Give the branches their weights in each layer, to be summed or merged."""
        weights = (self.magnitudes.detach().unsqueeze(0) * self.scales).cpu()
        assert len(past.factors) == weights.shape[1], f"{len(past.factors)} branches, {weights.shape[1]} magnitudes"
        branches = [
            replace(factors, weight={layer: float(weights[row, part]) for layer, row in self._rows.items()})
            for part, factors in enumerate(past.factors)
        ]
        return replace(past, factors=branches)
