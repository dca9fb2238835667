"""InfLoRA: train B alone, with A fixed in the new domain's inputs and outside of those of past domains.

With A frozen, training B equals fine-tuning the weight with its update projected by A^T A. M holds the main input
directions of past domains. Before a domain, with the model as it is: X' = X - M M^T X = U S V^T, A = c U_r^T, B = 0.
After it M grows by the domain's features, branch active (`kept_features.grow_kept`), and the branch is merged.

Source: InfLoRA (CVPR 2024, arXiv 2404.00228), its code for the energies' schedule, c and sigma^4. Departures from the
code: U is that of P X, where the code has P X X^T (`directions: moments`); the first domain reaches its share of energy
(`rank_rule`); dropout and training mode are the run's. DualGPM stores M_perp once M has more than d_in / 2 columns;
here M grows on, as both are the same subspace (tested) and a run directory keeps of each domain what it added: at most
d_in columns in all, in place of d_in / 2. That also does without the published code's mix-up of both after a first
domain that fills half the space.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.strategies.base import Branch, Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.footprint import Footprint, PassSizes, feature_pass
from mllm_keeplora.strategies.subspace.deciding import decided_features
from mllm_keeplora.strategies.subspace.kept_features import KeptFeatureOptions, begin_kept, branch_outside, grow_kept

if TYPE_CHECKING:
    from torch import Tensor


class InfLoRAOptions(KeptFeatureOptions):
    """Defaults are published for ImageNet-R; nothing is for LLaVA. The published code has no alpha / rank: scaling 1.

    A starts from the singular vectors of the features outside of M, or of their `moments` as in the published code,
    which needs exact statistics.
    """

    rank: int = Field(10, ge=1)
    alpha: float = Field(10.0, gt=0.0)
    energy: float = Field(0.98, ge=0.0, le=1.0)  # CIFAR-100 and DomainNet 0.95, T5 0.995
    energy_end: float = Field(1.0, ge=0.0, le=1.0)
    energy_measure: Literal["sigma2", "sigma4"] = "sigma4"  # the published energies belong to it
    row_length: float = Field(1 / math.sqrt(3), gt=0.0)  # c: that of a row as plain LoRA starts it; 1 in the paper
    directions: Literal["features", "moments"] = "features"


class InfLoRA(Strategy):
    """Stores per domain: A, B and the columns of M that the domain added."""

    Options: ClassVar[type[StrategyOptions]] = InfLoRAOptions
    presets: ClassVar[dict[str, dict]] = {
        "paper": {"energy_measure": "sigma2", "row_length": 1.0},
        "official": {"rank_rule": "below_legacy", "directions": "moments"},
    }
    trains: ClassVar[tuple[str, ...]] = ("B",)
    options: InfLoRAOptions

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate a feature pass before the domain, and one behind it."""
        plan = self.options.feature_plan(exact=self.options.directions == "moments")
        return {**self.options.footprint(sizes), "gradient": feature_pass(sizes, plan.statistic, plan.size)}

    def prepare(self, context: Context) -> None:
        begin_kept(context)

    def before_domain(self, context: Context) -> Branch:
        from mllm_keeplora.linalg import moment_rows

        options = self.options
        squared = options.directions == "moments"
        plan = options.feature_plan(exact=squared)

        def begin(layer: str, source: Any) -> Tensor:
            rows = moment_rows(source) if squared else source
            found = context.kept[layer].missing(rows, 1.0, reference="residual", limit=options.rank)
            return options.row_length * found.mT.contiguous()

        A: dict[str, Tensor] = {}
        for features in decided_features(context, options.feature_samples, plan, lambda layer, sketch: True):
            A |= context.processes.dealt(features.get, begin, features)
        return branch_outside(context, options, {layer: A[layer] for layer in context.layers.names}, self.trains)

    def after_domain(self, context: Context) -> None:
        grow_kept(context, self.options)
