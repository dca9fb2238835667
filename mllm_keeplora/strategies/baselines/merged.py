"""A branch for each domain, trained from the base, and after each domain all of them merged into one that answers.

Task vectors Delta_t = s B_t A_t of a layer, of domains t = 1..T so far, become Delta by one `rule`:

    sum         Delta = scale * sum_t Delta_t                                         (task arithmetic)
    ties        trim each Delta_t to the share `density` of its largest entries, elect each entry's sign by the sum,
                Delta = scale * mean of the entries that have it
    dare        drop entries of each Delta_t with chance `drop`, divide the rest by 1 - drop, then as `sum`
    dare_ties   drop likewise, then elect and average as `ties`
    regmean     Delta = (sum_t Delta_t G_t) (sum_t G_t)^-1,  G_t = X^T X / n of the layer's inputs in domain t with its
                branch, all but the diagonal times `off_diagonal`

Sum and regmean are kept exactly, as factors of rank T r: regmean as B = [s B_1 ..], A = [A_1 G_1; ..] (sum G)^-1. The
others are dense, one layer at a time, and kept as the nearest product of rank `stored_rank`; `lost` in the records is
the share of squared entries that this costs. Parameters trained in full (a projector's) merge by the same rule, with
regmean by their mean.
Sources: task arithmetic, Ilharco et al. (ICLR 2023, arXiv 2212.04089); TIES, Yadav et al. (NeurIPS 2023, arXiv
2306.01708); DARE, Yu et al. (ICML 2024, arXiv 2311.03099); RegMean, Jin et al. (ICLR 2023, arXiv 2212.09849).
Departures: trimming is by layer, as in peft, not over the whole model; G_t is a mean over tokens, so that domains count
alike. A mask depends on `seed`, domain and layer alone.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mllm_keeplora.adapters import Factors, concatenate
from mllm_keeplora.probes.plans import by_identity
from mllm_keeplora.strategies.base import Branch, Context, Samples, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import ALWAYS, Footprint, PassSizes, feature_pass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MEANS = ("ties", "dare_ties")  # rules that average by themselves
DENSE = 8  # float64 matrices of the largest layer alive where its task vectors are merged, for a few domains


class MergedOptions(StrategyOptions):
    """Without `scale` a plain mean of task vectors answers, which is the branch itself after the first domain.

    The preset `task-arithmetic` has 0.3, a value that Ilharco et al. found good for eight tasks together; it holds for
    the first domain, too. `density` is the 20 % that Yadav et al. keep, with their scale of 1; `drop` and
    `off_diagonal` are those of Yu et al. and Jin et al. `samples` is our choice.
    """

    rule: Literal["sum", "ties", "dare", "dare_ties", "regmean"] = "sum"
    scale: float | None = Field(None, gt=0.0)  # null: 1 / T with sum and dare, 1 with those that elect
    density: float = Field(0.2, gt=0.0, le=1.0, description="share of entries that `ties` keeps")
    drop: float = Field(0.9, ge=0.0, lt=1.0, description="chance of an entry to be dropped by `dare`, `dare_ties`")
    seed: int = Field(0, ge=0, description="of the masks")
    stored_rank: int | None = Field(None, ge=1)  # of a dense result; null: as many as the branches have together
    off_diagonal: float = Field(0.9, ge=0.0, le=1.0, description="what `regmean` multiplies moments by")
    samples: Samples = 512  # records of a domain for the moments of `regmean`

    @model_validator(mode="after")
    def _no_scale_of_a_fit(self) -> MergedOptions:
        if self.rule == "regmean" and self.scale is not None:
            raise ValueError(
                f"scale is {self.scale:g}, but has no meaning with rule regmean, whose fit has a size of its own"
            )
        return self


class Merged(Strategy):
    """Stores the merged branch, and to go on one branch a domain; with regmean also moments of every distinct input.

    These are (d_in, d_in): 20 GiB in float32 for all layers of LLaVA-1.5-7B, 6 GiB without those of `down_proj`.
    """

    Options: ClassVar[type[StrategyOptions]] = MergedOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "task-arithmetic": {"rule": "sum", "scale": 0.3},
        "ties": {"rule": "ties"},
        "dare": {"rule": "dare"},
        "dare-ties": {"rule": "dare_ties"},
        "regmean": {"rule": "regmean"},
    }
    start_from: ClassVar[Literal["base"]] = "base"
    recalls: ClassVar[Literal["all"]] = "all"
    options: MergedOptions

    def __init__(self, options: MergedOptions):
        super().__init__(options)
        self.load_state_dict({})

    def footprint(self, sizes: PassSizes) -> Footprint:
        if self.options.rule == "regmean":
            summed = sizes.moment * sum(d_in**2 for d_in in sizes.base.input_widths)
            return {"consolidate": feature_pass(sizes), ALWAYS: {"summed moments": summed}}
        dense = 0 if self.options.rule == "sum" else DENSE * 8 * max(d_out * d_in for d_out, d_in in sizes.layers)
        return {"consolidate": {"task vectors": dense}}

    def before_domain(self, context: Context) -> Branch:
        return fresh_branch(context, self.options)

    def after_domain(self, context: Context) -> None:
        trained = [context.trained(index) for index in range(context.domain.index + 1)]
        branches, share = [factors for factors, _ in trained], self._scale(len(trained))
        if self.options.rule == "sum":
            factors = scaled(concatenate(branches), share)
        elif self.options.rule == "regmean":
            self._look(context, branches[-1])
            factors = self._regressed(context, branches)
        else:
            factors = self._dense(context, branches)
        full = {name: self._rule(name, [deltas[name] for _, deltas in trained]) for name in context.branches.full}
        context.answer_as(factors, "all", full or None)

    def state_dict(self) -> dict[str, Tensor]:
        moments = {f"moments|{'|'.join(group)}": self.moments[group[0]] for group in by_identity(self.moments)}
        return moments | {f"inner|{layer}": rows for layer, rows in self.inner.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back sums of moments, one object for layers with one input, and A_t G_t of all domains."""
        self.moments: dict[str, Tensor] = {}
        self.inner: dict[str, Tensor] = {}
        for key, tensor in state.items():
            kind, *layers = key.split("|")
            (self.moments if kind == "moments" else self.inner).update(dict.fromkeys(layers, tensor))

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _scale(self, count: int) -> float:
        if self.options.scale is not None:
            return self.options.scale
        return 1.0 if self.options.rule in MEANS else 1 / count

    def _rule(self, name: str, deltas: list[Tensor]) -> Tensor:
        """Merge tensors of one name, in the order of their domains."""
        from mllm_keeplora.linalg import dropped, elected_mean, trimmed

        rule = self.options.rule
        if rule == "ties":
            deltas = [trimmed(delta, self.options.density) for delta in deltas]
        elif rule in ("dare", "dare_ties"):
            masks = [self._masks(name, index) for index in range(len(deltas))]
            deltas = [dropped(delta, self.options.drop, each) for delta, each in zip(deltas, masks, strict=True)]
        return self._scale(len(deltas)) * (elected_mean(deltas) if rule in MEANS else sum(deltas))

    def _masks(self, name: str, index: int) -> torch.Generator:
        """Seed a tensor's mask, the same in whichever process and order it is drawn."""
        import torch

        told = hashlib.sha256(f"{self.options.seed} {index} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(told[:7], "big"))

    def _dense(self, context: Context, branches: list[Factors]) -> Factors:
        """Merge layer by layer, each in one process."""
        from mllm_keeplora.linalg import nearest_product

        device = next(context.branches.model.parameters()).device

        def merge(layer: str, branches: list[Factors]) -> tuple[Tensor, Tensor, float]:
            rank = self.options.stored_rank or sum(each.ranks[layer] for each in branches)
            merged = self._rule(layer, [each.delta(layer).to(device) for each in branches])
            B, A, lost = nearest_product(merged, rank)
            return B.cpu(), A.cpu(), lost

        found = context.processes.dealt(lambda layer: branches, merge)
        lost = [each[2] for each in found.values()]
        context.log({"lost": {"mean": sum(lost) / len(lost), "max": max(lost)}})
        A, B = ({layer: each[place] for layer, each in found.items()} for place in (1, 0))
        return Factors(A, B, {layer: float(len(each)) for layer, each in A.items()})

    def _look(self, context: Context, branch: Factors) -> None:
        """Add the moments of the domain that has just been learnt, and what its A has to do with them."""
        import torch

        from mllm_keeplora.linalg import damped

        sums: dict[tuple[int, int], Tensor] = {}
        for layer, each in context.passes.features(self.options.samples).items():
            moments = damped(each.moments / max(1, each.count), self.options.off_diagonal)
            rows = (branch.A[layer].to(moments) @ moments).cpu()
            before = self.moments.get(layer)
            key = id(each), id(before)
            if key not in sums:  # layers with one input share it
                sums[key] = (moments if before is None else moments + before.to(moments)).cpu()
            self.inner[layer] = torch.cat([self.inner[layer], rows]) if layer in self.inner else rows
            self.moments[layer] = sums[key]

    def _regressed(self, context: Context, branches: list[Factors]) -> Factors:
        from mllm_keeplora.linalg import regressed

        mean = scaled(concatenate(branches), 1 / len(branches))
        device = next(context.branches.model.parameters()).device

        def solve(layer: str, moments: Tensor) -> Tensor | None:
            # A layer that no input ever reached has the mean.
            moments = moments.to(device)
            return regressed([self.inner[layer].to(moments)], moments).float().cpu() if moments.any() else None

        found = context.processes.dealt(self.moments.__getitem__, solve)
        A = {layer: mean.A[layer] if rows is None else rows for layer, rows in found.items()}
        share = {layer: 1 if found[layer] is None else len(branches) for layer in A}
        return Factors(A, {layer: share[layer] * mean.B[layer] for layer in A}, mean.alpha)


def scaled(factors: Factors, share: float) -> Factors:
    """Give a branch whose delta is so many times that of another."""
    return Factors(factors.A, {layer: share * B for layer, B in factors.B.items()}, factors.alpha)
