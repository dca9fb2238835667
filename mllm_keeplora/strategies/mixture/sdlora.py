"""SD-LoRA: freeze the directions of earlier branches, go on training how much each of them counts.

    y = W x + sum_{i<=t} alpha_i nu_{i,l} Dbar_{i,l} x,    Dbar_{i,l} = B_i A_i / ||B_i A_i||_F  of layer l

Trained at domain t are A_t, B_t and all magnitudes alpha_1..alpha_t, one each for all layers together. The newest
branch has no direction while B_t = 0, so it trains as alpha_t B_t A_t; from then on nu_{i,l} is its norm, and nothing
changes where the next domain begins. `kd_threshold` drops a finished branch that the earlier directions make up for.
Source: SD-LoRA (ICLR 2025, arXiv 2501.13198) and its code (WuYichen-97/SD-Lora-CL, 8bacded). Departures: the paper has
no nu (`nu: one`, which takes hold where the next domain begins: a domain is answered as it was trained). The code
divides by ||B||_F ||A||_F and starts every magnitude anew in each domain (`compat: official`); it has no drop, and its
optimizer and loss are the run's here. The fit of the drop weighs layers by nu; what is left is a share of the squared
norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mllm_keeplora.strategies.base import Branch, Context, Need, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters import Factors


class SDLoRAOptions(StrategyOptions):
    """Defaults are the paper's (query and value layers of a ViT): rank 10, no scale (alpha = rank), magnitudes 1."""

    rank: int = Field(10, ge=1)
    alpha: float = Field(10.0, gt=0.0, description="alpha / rank also holds for `later_ranks`")
    magnitude: float = Field(1.0, gt=0.0, lt=float("inf"), description="of a new branch; the published code has 0.8")
    magnitude_rate: float = Field(1.0, gt=0.0, lt=float("inf"))  # times train.lr; Adam moves one by lr a step
    nu: Literal["norm", "one"] = "norm"
    compat: Literal["none", "official"] = "none"
    later_ranks: dict[int, int] = Field(default_factory=dict, description="from this 0-based domain on -> rank (RR)")
    kd_threshold: float | None = Field(None, ge=0.0, le=1.0)  # the paper has 9e-4; null = nothing is dropped

    @field_validator("later_ranks")
    @classmethod
    def _places_and_ranks(cls, value: dict[int, int]) -> dict[int, int]:
        if any(place < 1 or rank < 1 for place, rank in value.items()):
            raise ValueError("places and ranks must be at least 1; the first domain has strategy.rank")
        return value

    @model_validator(mode="after")
    def _one_norm(self) -> SDLoRAOptions:
        if self.compat == "official" and self.nu != "one":
            raise ValueError(f"compat official shortens earlier branches to directions: it needs nu one, got {self.nu}")
        return self

    def in_domain(self, index: int) -> StrategyOptions:
        """Give the rank of a domain, and the alpha that leaves alpha / rank as it is."""
        begun = [place for place in self.later_ranks if place <= index]
        rank = self.later_ranks[max(begun)] if begun else self.rank
        return StrategyOptions(rank=rank, alpha=self.alpha * rank / self.rank)


class SDLoRA(Strategy):
    """Stores every branch, a number for each, and a bit whether it is in use; norms are computed from the branches."""

    Options: ClassVar[type[StrategyOptions]] = SDLoRAOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "official": {"compat": "official", "nu": "one", "magnitude": 0.8},
        "rr": {"later_ranks": {4: 8, 8: 6}},
        "kd": {"kd_threshold": 9e-4},
    }
    combine: ClassVar[Literal["sum"]] = "sum"
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: SDLoRAOptions

    def __init__(self, options: SDLoRAOptions):
        super().__init__(options)
        self.load_state_dict({})

    def before_domain(self, context: Context) -> Branch:
        import torch

        options, count = self.options, len(context.branches.past)
        assert count == len(self.magnitudes), f"{count} branches, magnitudes of {len(self.magnitudes)}"
        earlier = self.magnitudes
        if options.compat == "official":
            earlier = torch.full_like(earlier, options.magnitude)
        magnitudes = torch.cat([earlier, torch.tensor([options.magnitude])])
        mixer = self._mixer(context, magnitudes, self._scales(context))
        branch = fresh_branch(context, options.in_domain(context.domain.index))
        return replace(branch, mixer=mixer)

    def after_domain(self, context: Context) -> None:
        import torch

        magnitudes = context.branches.mixer.magnitudes.detach().cpu()
        in_use = torch.cat([self.in_use[: len(magnitudes) - 1], torch.tensor([True])])
        scales, facts = self._scales(context), {}
        if self.options.kd_threshold is not None and len(magnitudes) > 1:
            coefficients, left = self._fitted(context, scales)
            facts["unexplained"] = left
            if left <= self.options.kd_threshold:
                magnitudes = magnitudes + magnitudes[-1] * torch.cat([coefficients, torch.tensor([-1.0])])
                in_use[-1], scales[:, -1] = False, 0.0
        self.magnitudes, self.in_use = magnitudes, in_use
        context.answer_with(self._mixer(context, magnitudes, scales))
        context.log({"magnitudes": magnitudes.tolist(), "dropped": (~in_use).nonzero().flatten().tolist(), **facts})

    def state_dict(self) -> dict[str, Tensor]:
        return {"magnitudes": self.magnitudes, "in_use": self.in_use}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        import torch

        self.magnitudes: Tensor = state.get("magnitudes", torch.zeros(0))
        self.in_use: Tensor = state.get("in_use", torch.zeros(0, dtype=torch.bool))

    def _mixer(self, context: Context, magnitudes: Tensor, scales: Tensor) -> Any:
        from mllm_keeplora.adapters.mixers.magnitudes import Magnitudes

        mixer = Magnitudes(context.layers.names, len(magnitudes), self.options.magnitude_rate)
        mixer.start.copy_(magnitudes)
        mixer.scales.copy_(scales)
        return mixer

    def _scales(self, context: Context) -> Tensor:
        """What makes a branch's product its direction times nu, (layers, branches): 0 if dropped, 1 for the newest."""
        import torch

        from mllm_keeplora.linalg import gram_of_products

        past, layers = context.branches.past, context.layers.names
        in_use = torch.cat([self.in_use[: len(past)].float(), torch.ones(1)]).expand(len(layers), -1).clone()
        if self.options.nu == "norm" or not past:
            return in_use

        def norms(layer: str, branches: list[Factors]) -> Tensor:
            pairs = [(each.B[layer], each.A[layer]) for each in branches]
            if self.options.compat == "official":
                lengths = torch.stack([B.double().norm() * A.double().norm() for B, A in pairs])
            else:
                lengths = gram_of_products(pairs).diagonal().sqrt()
            return lengths * _scalings(layer, branches)

        found = context.processes.dealt(lambda layer: past, norms)
        lengths = torch.stack([found[layer] for layer in layers])
        in_use[:, :-1] *= torch.where(lengths > 0, 1 / lengths, 0.0).float()
        return in_use

    def _fitted(self, context: Context, scales: Tensor) -> tuple[Tensor, float]:
        """Coefficients of the earlier branches, as they are scaled, that come nearest to the newest; the share left."""
        import torch

        from mllm_keeplora.linalg import fit_last, gram_of_products

        branches = [*context.branches.past, context.branches.read()]
        rows = dict(zip(context.layers.names, scales.double(), strict=True))

        def gram(layer: str, branches: list[Factors]) -> Tensor:
            factor = rows[layer] * _scalings(layer, branches)
            return gram_of_products([(each.B[layer], each.A[layer]) for each in branches]) * factor.outer(factor)

        found = context.processes.dealt(lambda layer: branches, gram)
        coefficients, left = fit_last(torch.stack([found[layer] for layer in context.layers.names]).sum(dim=0))
        return coefficients.float(), left


def _scalings(layer: str, branches: list[Factors]) -> Tensor:
    """alpha / rank of each branch in a layer, float64."""
    import torch

    return torch.tensor([each.unweighted().scaling(layer) for each in branches], dtype=torch.float64)
