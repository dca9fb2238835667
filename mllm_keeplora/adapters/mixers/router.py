"""A router over domains: the branch of the domain whose questions are nearest answers, or the base alone.

It looks at what frozen parts see in the question (`features`), or at what the base alone makes of it, so no domain is
named and no answer changes the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mllm_keeplora.adapters.mixers.gates import balanced
from mllm_keeplora.adapters.mixers.mixing import Mixer


class Nearest(Mixer):
    """Choose the nearest domain, by distances that a class of its own defines.

    Args:
        domains, width, pictures: how many domains and features there are, and whether these are of pictures too.
        features: what it looks at: frozen parts, or the states that the base alone ends the question with.

    Attributes:
        limits: (domains,) distance up to which a question may be a domain's; infinite where none is rejected.
    """

    def __init__(
        self, domains: int, width: int, pictures: bool, features: Literal["frozen", "final_hidden"] = "frozen"
    ):
        super().__init__()
        self.pictures, self.width, self.features = pictures, width, features
        self.register_buffer("limits", torch.full((domains,), torch.inf))

    def settings(self) -> dict[str, Any]:
        own = {} if self.features == "frozen" else {"features": self.features}  # files from before have no such key
        return {"domains": len(self.limits), "width": self.width, "pictures": self.pictures, **own}

    def distances(self, features: Tensor) -> Tensor:
        """Give the distances (n, domains) of features (n, width) to each domain."""
        raise NotImplementedError

    def choose(self, features: Tensor) -> Tensor:
        """Give weights (n, domains): one for the nearest domain, none where a question is beyond every limit."""
        distances = self.distances(features)
        nearest = functional.one_hot(distances.argmin(dim=1), distances.shape[1])
        return nearest * (distances <= self.limits).any(dim=1, keepdim=True)

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> Tensor:
        if self.features == "frozen":
            return self.choose(self.family.question_features(model, batch, self.pictures)).float()
        self.weights = self.limits.new_zeros(len(self.limits))  # the base alone is asked, then the chosen branch
        return self.choose(self.family.question_states(model, batch, self.pictures)).float()


class Router(Nearest):
    """Choose the nearest domain in whitened features: a linear discriminant with equal priors.

    Attributes:
        whitening: (width, width); whitened features have the identity as their covariance within a domain.
        means: (domains, width) mean whitened features of each domain's questions.
    """

    kind = "router"

    def __init__(self, domains: int, width: int, pictures: bool, **others: Any):
        super().__init__(domains, width, pictures, **others)
        self.register_buffer("whitening", torch.zeros(width, width))
        self.register_buffer("means", torch.zeros(domains, width))

    def distances(self, features: Tensor) -> Tensor:
        """Give the Mahalanobis distances (n, domains) of features (n, width) to each domain's mean."""
        white = features.to(self.whitening) @ self.whitening.mT
        return torch.cdist(white, self.means, compute_mode="donot_use_mm_for_euclid_dist")


class Scores(Nearest):
    """Choose the domain of the highest linear score; what a score lacks of one is a distance.

    Args:
        words: how many features are of words, where scores are cosines; None where they are of features as they are.

    Attributes:
        columns: (domains, width), a score's weights; prototypes of length one where scores are cosines.
    """

    kind = "scores"

    def __init__(self, domains: int, width: int, pictures: bool, words: int | None = None, **others: Any):
        super().__init__(domains, width, pictures, **others)
        self.words = words
        self.register_buffer("columns", torch.zeros(domains, width))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "words": self.words}

    def distances(self, features: Tensor) -> Tensor:
        """Give one less the scores (n, domains) of features (n, width)."""
        features = features.to(self.columns)
        return 1 - (features if self.words is None else unit(features, self.words)) @ self.columns.mT


def unit(features: Tensor, words: int) -> Tensor:
    """Make features (n, d) of length one, those of pictures counting as much as those of the first `words`."""
    return functional.normalize(balanced(features, words))
