"""Which rows of a feature tensor count in a data pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from mllm_keeplora.probes.plans import FeaturePlan

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.models.family import Family


class ChosenRows:
    """Choose the rows that count: no padding, and of each kind of token no more than the plan allows.

    Args:
        kinds: masks (b, t) of the tokens that count, from `Family.token_kinds`.
        plan: how many tokens of each kind, and whether they are normalised.
    """

    def __init__(self, kinds: Mapping[str, Tensor], plan: FeaturePlan):
        self.plan = plan
        self.budgets = plan.tokens or {}
        self.chosen = reduce(or_, (_evenly(mask, self.budgets.get(kind)) for kind, mask in kinds.items()))
        if not plan.first and "instruction" in kinds:  # else pictures alone
            self.chosen = self.chosen & (reduce(or_, kinds.values()).cumsum(1) != 1)

    @classmethod
    def by_layer(
        cls, family: Family, model: Any, batch: Mapping[str, Tensor], plan: FeaturePlan
    ) -> Callable[[str], ChosenRows]:
        """Choose the rows of each target layer by what its tower sees in a batch."""
        of_tower = cache(lambda pictures: cls(family.token_kinds(model, batch, pictures), plan))
        return lambda layer: of_tower(family.sees_pictures(layer))

    def of(self, features: Tensor) -> Tensor:
        """Give the rows (n, d_in); a tensor not laid out as (b, t, d_in) carries picture tokens and no padding."""
        if features.shape[:-1] == self.chosen.shape:
            rows = features[self.chosen]
        else:
            rows = as_rows(features)
            mask = self.chosen.new_ones(len(self.chosen), len(rows) // len(self.chosen))
            chosen = _evenly(mask, self.budgets.get("image"))
            rows = rows if chosen is mask else rows[: mask.numel()][chosen.flatten()]
        if self.plan.normalise:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return rows


def _evenly(mask: Tensor, allowed: int | None) -> Tensor:
    """At most `allowed` of the true entries of each row of a (b, t) mask, evenly spaced; None for all of them."""
    if allowed is None:
        return mask
    order = mask.cumsum(1) - 1  # place of each true entry among those of its row
    count = mask.sum(1, keepdim=True).clamp(min=1)
    begins_slot = order * allowed // count != (order - 1) * allowed // count
    return mask & ((count <= allowed) | begins_slot)


def as_rows(features: Tensor) -> Tensor:
    """Flatten any leading dimensions: (n, d)."""
    return features.reshape(-1, features.shape[-1])
