"""Options of KeepLoRA: where the published code departs from its paper, each reading is a value; presets pin them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from mllm_keeplora.errors import UserError, known, several
from mllm_keeplora.probes.plans import FeaturePlan, GradientPlan, Spacing, Statistic
from mllm_keeplora.strategies.base import Samples, StrategyOptions

if TYPE_CHECKING:
    import torch

    from mllm_keeplora.linalg import RandomizedSVD

Threshold = Literal["energy_weights", "energy_features", "energy_anchor"]


class KeepLoRAOptions(StrategyOptions):
    """Defaults are our own; `presets` has the published ones.

    Samples are counts of records, or shares of them (0.2, 1.0); `sample_spacing: ends` takes the first and the last
    among them and cuts the count, as the published code does. `share_basis: input` lets layers with the same input
    (q, k, v; gate, up) keep what any of them keeps: stricter, and full sooner. `basis_dtype` is how bases and A are
    kept; bases are orthonormalised again when they are read, which the published code leaves out. `max_kept` is for
    long sequences: the least used feature directions are given up (our own; the published rule goes on until the space
    is full). `layer_scale` is KeepLoRA++: `linear` from `layer_scale_gamma` at the first layer to 1 at the last,
    `reversed`, one number for all layers, or a list of one number per layer; in each tower of `layer_scale_towers`, 1
    elsewhere. `weight_side: output_legacy` is what the published code for CLIP keeps of a weight: its leading output
    directions, taken for input directions, which square layers alone allow.
    """

    energy_weights: float = Field(0.6, ge=0.0, le=1.0)
    energy_features: float = Field(0.99, ge=0.0, le=1.0)
    energy_anchor: float = Field(0.99, ge=0.0, le=1.0)
    thresholds: dict[str, dict[Threshold, float]] = Field(default_factory=dict)  # by regular expression of layer names
    rank_rule: Literal["reach", "below_legacy"] = "reach"
    weight_side: Literal["input", "output_legacy"] = "input"
    share_basis: Literal["module", "input"] = "module"
    energy_reference: Literal["total", "residual"] = "total"

    sample_spacing: Spacing = "even"
    grad_samples: Samples = 512
    gradient_statistic: Statistic = "auto"
    sketch_width: int | None = Field(None, ge=1)  # columns; null = 3 times the rank, 8 times along random directions
    sketch_directions: Literal["following", "random"] = "following"  # they follow the gradient
    a_init: Literal["gradient", "random_complement", "random"] = "gradient"
    a_init_svd: Literal["exact", "randomized"] = "exact"
    oversample: int | None = Field(None, ge=0, description="of a randomized SVD; null = width of 4 times the rank")
    power_iters: int = Field(4, ge=0)
    b_init: Literal["zero", "gradient"] = "zero"
    freeze_a: bool = True
    on_exhaustion: Literal["reduce_rank", "error", "freeze_module"] = "reduce_rank"

    feature_source: Literal["activations", "post_gradient"] = "activations"
    feature_samples: Samples = 512
    feature_statistic: Statistic = "auto"
    feature_sketch_size: int = Field(1024, ge=1)
    feature_tokens: dict[Literal["image", "instruction", "answer"], Annotated[int, Field(ge=0)]] | None = None
    normalise_tokens: bool = False
    feature_padding: bool = Field(False, description="count what a text tower computes behind the end of its texts")
    statistics_memory_gb: float | None = Field(None, gt=0.0)

    max_kept: float | None = Field(None, gt=0.0, le=1.0, description="share of a layer's inputs; null = no bound")

    basis_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    layer_scale: Literal["none", "linear", "reversed"] | float | list[float] = "none"
    layer_scale_gamma: float = Field(0.2, gt=0.0, le=1.0)
    layer_scale_towers: tuple[str, ...] | None = Field(None, description="`vision`, `text`, `language`; null = all")

    prototypes: Literal["cosine"] | None = Field(None, description="of classes, trained beside the branch: KeepLoRA+")
    prototype_scale: float = Field(30.0, gt=0.0)

    anchors: tuple[str, ...] = Field((), description="suites with anchors, or files of training records")
    anchor_samples: int = Field(256, ge=1)

    @field_validator("thresholds")
    @classmethod
    def _patterns_and_shares(cls, value: dict) -> dict:
        for pattern, energies in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if not energies:
                raise ValueError(f"{pattern!r} names no energy; allowed: {', '.join(get_args(Threshold))}")
            wrong = [energy for energy in energies.values() if not 0.0 <= energy <= 1.0]
            if wrong:
                raise ValueError(f"energies of {pattern!r} must be in [0, 1], got {wrong[0]}")
        return value

    @field_validator("layer_scale")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value] if not isinstance(value, str) else []
        if any(not 0.0 < number < math.inf for number in numbers):
            raise ValueError("must be above 0 and finite")
        return value

    @field_validator("sketch_width")
    @classmethod
    def _wide_enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        rank = info.data.get("rank", 1)
        if value is not None and value < rank:
            raise ValueError(f"must be at least the rank {rank}")
        return value

    @property
    def record_sets(self) -> tuple[str, ...]:
        return self.anchors

    def threshold(self, name: str, layer: str) -> float:
        """Give the energy of a layer: by the first pattern that matches it and names one, else the general one."""
        for pattern, energies in self.thresholds.items():
            if name in energies and re.search(pattern, layer):
                return energies[name]
        return getattr(self, name)

    @property
    def every_class(self) -> bool:
        return self.prototypes is not None

    def refuse_idle_patterns(self, layers: Iterable[str]) -> None:
        """Raise a UserError if a pattern of `thresholds` matches no target layer."""
        layers = list(layers)
        for pattern in self.thresholds:
            if not any(re.search(pattern, layer) for layer in layers):
                raise UserError(f"strategy.thresholds: {pattern!r} matches none of {len(layers)} layers as {layers[0]}")

    def refuse_unfit(self, sizes: Mapping[str, tuple[int, int]], towers: Mapping[str, str | None]) -> None:
        faults, present = [], sorted({tower for tower in towers.values() if tower is not None})
        oblong = [layer for layer, (d_out, d_in) in sizes.items() if d_out != d_in]
        if self.weight_side == "output_legacy" and oblong:
            shape = " x ".join(map(str, sizes[oblong[0]]))
            faults.append(
                f"strategy.weight_side is output_legacy, but {len(oblong)} of {len(sizes)} layers are not square, "
                f"first {oblong[0]} ({shape}); allowed: input, or square layers alone in adapters.target"
            )
        if absent := [tower for tower in self.layer_scale_towers or () if tower not in present]:
            faults.append(f"strategy.layer_scale_towers: the base has no {', '.join(absent)}; it has {known(present)}")
        if self.feature_padding and "text" not in present:
            faults.append("strategy.feature_padding is true, but the base has no text tower that pads; allowed: false")
        if self.prototypes is not None and "text" not in present:
            faults.append(
                "strategy.prototypes is cosine, but the base does not compare pictures with classes; allowed: null"
            )
        if faults:
            raise several(faults)

    def layer_scales(self, depths: Mapping[str, int | None], towers: Mapping[str, str | None]) -> dict[str, float]:
        """Give the scale g_l of every layer from its depth in its tower; 1 outside of scaled towers (the projector).

        Source: KeepLoRA++, Eq. (11): g_l = gamma + (1 - gamma) (l - l_0) / (L - 1); a single layer gets 1.
        Raises:
            UserError: a list that has not one number per adapted layer of a tower.
        """
        scales = dict.fromkeys(depths, 1.0)
        for tower in {each: None for each in towers.values() if each is not None}:
            if self.layer_scale_towers is None or tower in self.layer_scale_towers:
                own = {layer: at for layer, at in depths.items() if at is not None and towers[layer] == tower}
                adapted = sorted(set(own.values()))
                by_depth = dict(zip(adapted, self._scales_of(tower, len(adapted)), strict=True))
                scales |= {layer: by_depth[at] for layer, at in own.items()}
        return scales

    def _scales_of(self, tower: str, count: int) -> list[float]:
        """The scales of a tower's adapted layers, in the order of their depths."""
        given, gamma = self.layer_scale, self.layer_scale_gamma
        if isinstance(given, list) and len(given) != count:
            raise UserError(f"strategy.layer_scale lists {len(given)} numbers for {count} adapted layers of {tower}")
        if isinstance(given, str):
            rising = [gamma + (1 - gamma) * place / (count - 1) for place in range(count)] if count > 1 else [1.0]
            given = {"none": 1.0, "linear": rising, "reversed": rising[::-1]}[given]
        return given if isinstance(given, list) else [given] * count

    def gradient_plan(self) -> GradientPlan:
        """Sum exactly where B starts from the gradient, which a sketch does not have."""
        statistic = self.gradient_statistic if self.b_init == "zero" else "exact"
        following = self.sketch_directions == "following"
        width = self.sketch_width or (3 if following else 8) * self.rank
        return GradientPlan(statistic, width, 0, self.statistics_memory_gb, following, self.sample_spacing)

    def feature_plan(self) -> FeaturePlan:
        size, memory = self.feature_sketch_size, self.statistics_memory_gb
        tokens, spacing = self.feature_tokens, self.sample_spacing
        how = self.normalise_tokens, spacing, self.feature_padding
        return FeaturePlan(self.feature_statistic, size, memory, tokens, *how)

    def randomized(self) -> RandomizedSVD | None:
        from mllm_keeplora.linalg import RandomizedSVD

        return RandomizedSVD(self.oversample, self.power_iters) if self.a_init_svd == "randomized" else None

    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.basis_dtype)


# Presets pin the readings of the departure table; ranks and samples are those of MLLM-DCL, or of MTIL. Not the
# strategy's: the projector (`adapters.projector: full` in the published LLaVA code, `frozen` in that for CLIP), the
# merge (`adapters.history`) and the training.
PAPER: dict[str, Any] = {
    "rank": 64, "alpha": 128.0, "energy_weights": 0.6, "energy_features": 0.99,
    "rank_rule": "reach", "weight_side": "input", "energy_reference": "total",
    "grad_samples": 0.2, "gradient_statistic": "exact", "a_init": "gradient", "a_init_svd": "exact",
    "b_init": "gradient", "freeze_a": True, "on_exhaustion": "reduce_rank",
    "feature_source": "activations", "feature_samples": 0.2, "feature_statistic": "exact",
    "basis_dtype": "float32", "layer_scale": "none",
}  # fmt: skip
OFFICIAL_LLAVA: dict[str, Any] = {
    **PAPER,
    "rank_rule": "below_legacy", "a_init_svd": "randomized", "oversample": 0, "power_iters": 2, "b_init": "zero",
    "feature_source": "post_gradient", "basis_dtype": "float16", "sample_spacing": "ends",
}  # fmt: skip
MTIL: dict[str, Any] = {
    "rank": 16, "alpha": 1.0, "energy_features": 0.99,
    "thresholds": {"^vision_model": {"energy_weights": 0.85}, "^text_model": {"energy_weights": 0.2}},
    "grad_samples": 1.0, "gradient_statistic": "exact", "feature_samples": 1.0, "feature_statistic": "exact",
}  # fmt: skip
OFFICIAL_MTIL: dict[str, Any] = {
    **PAPER, **MTIL,
    "rank_rule": "below_legacy", "weight_side": "output_legacy",
    "a_init_svd": "randomized", "oversample": None, "power_iters": 4,
    "feature_padding": True,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "official-llava": OFFICIAL_LLAVA,
    "official-llava-pp": {**OFFICIAL_LLAVA, "layer_scale": "linear", "layer_scale_gamma": 0.2},
    "mllm_dcl": {"rank": 64, "alpha": 128.0, "grad_samples": 0.2, "feature_samples": 0.2},
    "mtil": MTIL,
    "official-mtil": OFFICIAL_MTIL,
    "official-mtil-pp": {
        **OFFICIAL_MTIL, "b_init": "zero",
        "layer_scale": "linear", "layer_scale_gamma": 0.2, "layer_scale_towers": ["vision"],
    },
    "ucit": {"rank": 32, "alpha": 8.0, "grad_samples": 0.2, "feature_samples": 0.2},
}  # fmt: skip
