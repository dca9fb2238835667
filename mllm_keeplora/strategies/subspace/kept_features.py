"""What GPM and InfLoRA share: they keep the input directions of past domains. KeepLoRA grows by a rule of its own.

Shared are statistics, growth and the start of A. The directions are the run's kept bases, which only grow; layers that
are fed the same tensor keep the same ones.
Source: GPM (ICLR 2021, arXiv 2103.09762), whose rule is stated at `grow_kept`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from mllm_keeplora.errors import UserError
from mllm_keeplora.probes.plans import FeaturePlan, Statistic
from mllm_keeplora.strategies.base import Branch, Context, Samples, StrategyOptions
from mllm_keeplora.strategies.footprint import ALWAYS, Footprint, PassSizes, feature_pass
from mllm_keeplora.strategies.subspace.deciding import decided_features
from mllm_keeplora.system.log import log

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.linalg import FrequentDirections


class KeptFeatureOptions(StrategyOptions):
    """Options say which directions of a domain's features are kept.

    The share of energy rises from `energy` at the first domain towards `energy_end`. `energy_measure: sigma4` squares
    the squared singular values once more and needs exact statistics. `rank_rule: below_legacy` keeps one direction
    fewer than the share needs (at least one) at the first domain, as the published codes do. `feature_samples` is a
    count of records, or a share of them (0.2, 1.0).
    """

    energy: float = Field(0.95, ge=0.0, le=1.0)
    energy_end: float = Field(0.99, ge=0.0, le=1.0)
    energy_measure: Literal["sigma2", "sigma4"] = "sigma2"
    rank_rule: Literal["reach", "below_legacy"] = "reach"
    feature_samples: Samples = 512
    feature_statistic: Statistic = "auto"
    feature_sketch_size: int = Field(1024, ge=1)
    feature_tokens: dict[Literal["image", "instruction", "answer"], Annotated[int, Field(ge=0)]] | None = None

    @field_validator("feature_statistic")
    @classmethod
    def _exact_for_sigma4(cls, value: str, info: ValidationInfo) -> str:
        if value == "sketch" and info.data.get("energy_measure") == "sigma4":
            raise ValueError("must be exact or auto with energy_measure sigma4, which a sketch does not know")
        return value

    def energy_at(self, index: int, total: int) -> float:
        """Give the share of energy to keep at a domain: energy + (energy_end - energy) t / T, t from 0 of T."""
        return self.energy + (self.energy_end - self.energy) * index / total

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate what it takes to keep, and to grow what is kept after a domain."""
        grown = feature_pass(sizes, self.feature_statistic, self.feature_sketch_size)
        return {ALWAYS: {"kept bases": sizes.kept_bases()}, "consolidate": grown}

    def feature_plan(self, exact: bool = False) -> FeaturePlan:
        statistic = "exact" if exact else self.feature_statistic
        return FeaturePlan(statistic, self.feature_sketch_size, tokens=self.feature_tokens)


def begin_kept(context: Context) -> None:
    """Begin with nothing kept in any target layer."""
    from mllm_keeplora.linalg import Basis

    context.kept.update({layer: Basis(context.layers.d_in(layer)) for layer in context.layers.names})


def grow_kept(context: Context, options: KeptFeatureOptions) -> None:
    """Add to every kept basis M the fewest directions with which it holds a share of the domain's feature energy.

    With X' = X - M M^T X = U S V^T: M <- [M, U_r], r the smallest with (|X|^2 - |X'|^2 + S_1^2 + .. + S_r^2) / |X|^2 at
    least the share; under `sigma4` the moments X X^T stand in place of X. Called with the branch active.
    """
    from mllm_keeplora.linalg import moment_rows

    domain, squared = context.domain, options.energy_measure == "sigma4"
    energy = options.energy_at(domain.index, domain.total)
    rule = options.rank_rule if domain.index == 0 else "reach"

    def decides(layer: str, sketch: FrequentDirections) -> bool:
        return context.kept[layer].is_decided(sketch, energy)

    def missing(layer: str, source: Any) -> Tensor:
        return context.kept[layer].missing(moment_rows(source) if squared else source, energy, rule=rule)

    added: dict[str, int] = {}
    for features in decided_features(context, options.feature_samples, options.feature_plan(exact=squared), decides):
        for layer, columns in context.processes.dealt(features.get, missing, features).items():
            context.kept[layer].append(columns)
            added[layer] = columns.shape[1]
    context.log({"energy": energy, "added": added})


def branch_outside(context: Context, options: StrategyOptions, A: dict[str, Tensor], train: tuple[str, ...]) -> Branch:
    """Begin a branch whose rows of A lie outside of what is kept, as many as there was room for; B is zero.

    Args:
        A: layer -> (rank', d_in), rank' at most the rank. All have the same scaling alpha / rank; a layer without
            rows stays as it is.

    Raises:
        UserError: no layer has a row.
    """
    name, rank = context.domain.name, options.rank
    short = [layer for layer, rows in A.items() if len(rows) < rank]
    if not any(len(rows) for rows in A.values()):
        raise UserError(
            f"domain {name}: no target layer has a direction left to learn in; "
            "lower strategy.energy or strategy.energy_end"
        )
    if short:
        log.warning("%s: %d layers have fewer than %d directions, first %s", name, len(short), rank, short[0])
    A = {layer: rows for layer, rows in A.items() if len(rows)}
    return Branch(A, {layer: options.alpha / rank * len(rows) for layer, rows in A.items()}, train)
