"""A router over domains: the branch of the domain whose questions are nearest answers, or the base alone.

It looks at what frozen parts see in the question (`features`), so no domain is named and no answer changes the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllm_keeplora.adapters.mixers.mixing import Mixer


class Router(Mixer):
    """Choose the nearest domain in whitened features: a linear discriminant with equal priors.

    Args:
        domains, width, pictures: how many domains and features there are, and whether these are of pictures too.

    Attributes:
        whitening: (width, width); whitened features have the identity as their covariance within a domain.
        means: (domains, width) mean whitened features of each domain's questions.
        limits: (domains,) distance up to which a question may be a domain's; infinite where none is rejected.
    """

    kind = "router"

    def __init__(self, domains: int, width: int, pictures: bool):
        super().__init__()
        self.pictures = pictures
        self.register_buffer("whitening", torch.zeros(width, width))
        self.register_buffer("means", torch.zeros(domains, width))
        self.register_buffer("limits", torch.full((domains,), torch.inf))

    def settings(self) -> dict[str, Any]:
        domains, width = self.means.shape
        return {"domains": domains, "width": width, "pictures": self.pictures}

    def distances(self, features: Tensor) -> Tensor:
        """Give the Mahalanobis distances (n, domains) of features (n, width) to each domain's mean."""
        white = features.to(self.whitening) @ self.whitening.mT
        return torch.cdist(white, self.means, compute_mode="donot_use_mm_for_euclid_dist")

    def choose(self, features: Tensor) -> Tensor:
        """Give weights (n, domains): one for the nearest domain, none where a question is beyond every limit."""
        distances = self.distances(features)
        nearest = torch.nn.functional.one_hot(distances.argmin(dim=1), distances.shape[1])
        return nearest * (distances <= self.limits).any(dim=1, keepdim=True)

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> Tensor:
        return self.choose(self.family.question_features(model, batch, self.pictures)).float()
