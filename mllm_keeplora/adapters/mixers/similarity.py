"""Branches weighed by likeness: each takes part as much as a question looks like its domain's mean question.

It looks at what frozen parts see in the question (`features`). In some layers all branches may take part in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mllm_keeplora.adapters.mixers.mixing import Mixer

Modality = Literal["text", "picture", "both"]
FLOOR = 1e-3  # share of a vector's length that counts where the center leaves less: of equal means rounding is left


class Similarity(Mixer):
    """Weigh domains by the softmax of cosines: g_t = softmax_t(cos(q, m_t) / temperature).

    Args:
        domains, width, words: how many domains and features there are, and how many of the features are of words.
        modality: whose cosine counts; of `both` the mean of the two, and where there is no picture its cosine is zero.
        temperature: of the softmax.
        centered: whether cosines are about the mean of the domains' means.
        top1: whether the most alike domain alone answers.
        layers: names of the layers that are weighed, all branches being in the others; None for all layers.

    Attributes:
        means: (domains, width) mean features of each domain's questions.
    """

    kind = "similarity"

    def __init__(
        self,
        domains: int,
        width: int,
        words: int,
        modality: Modality,
        temperature: float,
        centered: bool = True,
        top1: bool = False,
        layers: Sequence[str] | None = None,
    ):
        super().__init__()
        self.words, self.modality, self.temperature = words, modality, temperature
        self.centered, self.top1 = centered, top1
        self.layers = None if layers is None else list(layers)
        self.register_buffer("means", torch.zeros(domains, width))

    def settings(self) -> dict[str, Any]:
        domains, width = self.means.shape
        names = ("words", "modality", "temperature", "centered", "top1", "layers")
        return {"domains": domains, "width": width, **{name: getattr(self, name) for name in names}}

    def likeness(self, features: Tensor) -> Tensor:
        """Give the cosines (n, domains) of features (n, width) with each domain's mean."""
        words, pictures = slice(None, self.words), slice(self.words, None)
        seen = {"text": [words], "picture": [pictures], "both": [words, pictures]}[self.modality]
        return torch.stack([self._cosines(features[:, part], self.means[:, part]) for part in seen]).mean(dim=0)

    def forward(self, features: Tensor) -> Tensor:
        """Give weights (n, domains), which sum to one."""
        alike = self.likeness(features)
        if self.top1:
            return functional.one_hot(alike.argmax(dim=1), alike.shape[1]).float()
        return torch.softmax(alike / self.temperature, dim=1)

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> Tensor:
        return self(self.family.question_features(model, batch, self.modality != "text").to(self.means))

    def of(self, layer: str, x: Tensor) -> Tensor:
        if self.layers is not None and layer not in self.layers:
            return self.means.new_ones(len(self.means))
        return super().of(layer, x)

    def _cosines(self, questions: Tensor, means: Tensor) -> Tensor:
        """Cosines (n, domains); nothing, as of a question without a picture, is like nothing."""
        there = means.any(dim=1)
        center = means[there].mean(dim=0) if self.centered and there.any() else means.new_zeros(means.shape[1])

        def unit(rows: Tensor) -> Tensor:
            moved = (rows - center) * rows.any(dim=1, keepdim=True)
            lengths = torch.maximum(moved.norm(dim=1), FLOOR * rows.norm(dim=1))
            return moved / lengths.clamp(min=torch.finfo(rows.dtype).tiny).unsqueeze(1)

        return (unit(questions).unsqueeze(1) * unit(means)).sum(dim=2)  # no product that autocast makes coarse
