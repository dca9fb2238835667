"""KeepLoRA: train only where past knowledge does not live.

Kept are the leading input directions of the pre-trained weights and the dominant feature directions of past domains;
A spans the top of the residual of the domain's mean gradient and stays frozen, only B is trained.
Source: KeepLoRA (ICLR 2026, arXiv 2601.19659), Eqs. (1)-(10) as numbered in this package's tests.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mllm_keeplora.errors import UserError
from mllm_keeplora.log import log
from mllm_keeplora.strategies.base import Context, Strategy, StrategyOptions


class KeepLoRAOptions(StrategyOptions):
    """Published defaults for MLLM-DCL: rank 64, alpha 128, 20 % of the data; see the presets.

    `grad_samples` and `feature_samples`: a count of records, or a share of them if below 1.
    """

    energy_weights: float = Field(0.6, ge=0.0, le=1.0)
    energy_features: float = Field(0.99, ge=0.0, le=1.0)
    grad_samples: int | float = Field(512, gt=0)
    feature_samples: int | float = Field(512, gt=0)
    layer_scale: Literal["none"] = "none"


class KeepLoRA(Strategy):
    """Stores per domain: A, B and the basis columns that the domain added."""

    Options: ClassVar[type[StrategyOptions]] = KeepLoRAOptions
    presets: ClassVar[dict[str, dict]] = {
        "mllm_dcl": {"rank": 64, "alpha": 128.0, "grad_samples": 0.2, "feature_samples": 0.2},
        "ucit": {"rank": 32, "alpha": 8.0, "grad_samples": 0.2, "feature_samples": 0.2},
    }

    def prepare(self, context: Context) -> None:
        """Kept basis of every layer = principal input subspace of its pre-trained weight, Eq. (1)."""
        from mllm_keeplora.linalg import Basis, principal_subspace

        for layer in context.target_layers:
            columns = principal_subspace(context.weight(layer), self.options.energy_weights)
            context.kept[layer] = Basis.from_columns(columns)

    def before_domain(self, context: Context) -> None:
        """A = top directions of the residual mean gradient, Eqs. (2)-(4); B = 0, Eq. (5b)."""
        from mllm_keeplora.adapters import Branch
        from mllm_keeplora.linalg import gradient_capture, top_residual_directions

        gradients = context.collect_weight_gradients(self.options.grad_samples)
        A, facts = {}, {}
        for layer, gradient in gradients.items():
            directions = top_residual_directions(gradient.mean, context.kept[layer], self.options.rank)
            split = gradient_capture(gradient.mean, context.kept[layer], directions)
            facts[layer] = {"rank": directions.shape[0], "kept": context.kept[layer].rank, **split}
            if directions.shape[0] > 0:
                A[layer] = directions
        _tell_of_exhaustion(context, {layer: fact["rank"] for layer, fact in facts.items()}, self.options.rank)
        scaling = self.options.alpha / self.options.rank  # a layer with fewer directions keeps the same scale
        alpha = {layer: scaling * directions.shape[0] for layer, directions in A.items()}
        context.log({"gradient": facts})
        context.branches.open(Branch(A, alpha, train=("B",)))

    def after_domain(self, context: Context) -> None:
        """Grow every kept basis by the domain's dominant feature directions, Eqs. (8)-(10)."""
        moments = context.collect_inputs(self.options.feature_samples)
        added = {
            layer: context.kept[layer].grow(moments[layer], self.options.energy_features)
            for layer in context.target_layers
        }
        context.log({"added": added})


def _tell_of_exhaustion(context: Context, ranks: dict[str, int], wanted: int) -> None:
    """Layers with fewer free directions than the rank learn with those; without any they stay as they are.

    Raises:
        UserError: no layer has a direction left.
    """
    if not any(ranks.values()):
        raise UserError(
            f"domain {context.domain.name}: no target layer has a direction left to learn in; "
            "lower strategy.energy_features or strategy.energy_weights"
        )
    short = [layer for layer, rank in ranks.items() if rank < wanted]
    if short:
        log.warning(
            "%s: %d layers have fewer than %d directions, first %s", context.domain.name, len(short), wanted, short[0]
        )
