"""Tokens: which of them count in a data pass, which predict a supervised one, and their losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_keeplora.models.causal.losses import IGNORED
from mllm_keeplora.probes.plans import FeaturePlan

if TYPE_CHECKING:
    from torch import Tensor


class ChosenRows:
    """Which rows of a feature tensor count: no padding, and of each kind of token no more than the plan allows.

    Args:
        batch: model inputs; `input_ids` and `labels` are needed only where the plan limits tokens.
        plan: how many tokens of each kind, and whether they are normalised.
        image_token: id of the token that stands for a picture's patch.
    """

    def __init__(self, batch: dict, plan: FeaturePlan, image_token: int | None):
        self.attention_mask = batch["attention_mask"].bool()
        self.plan = plan
        self.chosen = self.attention_mask
        if plan.tokens is not None:
            self.chosen = self._within_budget(batch, image_token)

    def of(self, features: Tensor) -> Tensor:
        """(n, d_in) rows; a tensor that is not laid out as (b, t, d_in) carries picture tokens and no padding."""
        if features.shape[:-1] == self.attention_mask.shape:
            rows = features[self.chosen]
        else:
            rows = self._picture_rows(features)
        if self.plan.normalise:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return rows

    def _within_budget(self, batch: dict, image_token: int | None) -> Tensor:
        image = (batch["input_ids"] == image_token) & self.attention_mask
        answer = (batch["labels"] != IGNORED) & self.attention_mask
        kinds = {"image": image, "answer": answer, "instruction": self.attention_mask & ~image & ~answer}
        chosen = self.attention_mask & False
        for kind, mask in kinds.items():
            allowed = self.plan.tokens.get(kind)
            chosen |= mask if allowed is None else _evenly(mask, allowed)
        return chosen

    def _picture_rows(self, features: Tensor) -> Tensor:
        rows = as_rows(features)
        allowed = (self.plan.tokens or {}).get("image")
        if allowed is None:
            return rows
        samples = self.attention_mask.shape[0]
        mask = self.attention_mask.new_ones(samples, rows.shape[0] // samples)
        return rows[: mask.numel()][_evenly(mask, allowed).flatten()]


def _evenly(mask: Tensor, allowed: int) -> Tensor:
    """At most `allowed` of the true entries of each row of a (b, t) mask, evenly spaced."""
    order = mask.cumsum(1) - 1  # place of each true entry among those of its row
    count = mask.sum(1, keepdim=True).clamp(min=1)
    slot = order * allowed // count
    before = (order - 1) * allowed // count
    return mask & ((count <= allowed) | (slot != before))


def as_rows(features: Tensor) -> Tensor:
    """(n, d) of any leading dimensions."""
    return features.reshape(-1, features.shape[-1])
