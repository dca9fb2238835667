"""GPM-LoRA: keep the input directions of past domains, and A of every new branch outside of them.

The gradient of a linear layer lies in the span of its inputs. M holds the main ones of past domains, P = I - M M^T. A
fresh branch starts at A P, each row as long as before, and A <- A - (A M) M^T after every step of the optimizer: then
B A x = 0 for x in the span of M whatever B and the optimizer are. After a domain M grows (`kept_features.grow_kept`).

Source: Gradient Projection Memory (ICLR 2021, arXiv 2103.09762), whose rule G <- G - G M M^T is for full weights. The
branch is our own adaptation; a branch carried on could not follow it, as its A lies in the inputs of past domains.
Departures: projection after the step (`mode: post`), for a projected gradient leaks under Adam and its relatives;
`mode: grad` is the published rule. The first domain reaches its share of energy (`rank_rule`); published is one
direction fewer, and possibly none. The default energies are none of the four published schedules, which belong to
small image classifiers. The projector is a target layer like any other, or trains unprotected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_keeplora.strategies.base import Branch, Context, Need, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes
from mllm_keeplora.strategies.subspace.kept_features import KeptFeatureOptions, begin_kept, branch_outside, grow_kept

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.linalg import Basis


class GPMOptions(KeptFeatureOptions):
    """Nothing is published for LLaVA: energies are those of the vision benchmarks, rank and alpha plain LoRA's."""

    mode: Literal["post", "grad"] = "post"  # grad is exact for gradient descent without adaptive scaling alone


class GPM(Strategy):
    """Stores per domain: A, B and the columns of M that the domain added."""

    Options: ClassVar[type[StrategyOptions]] = GPMOptions
    options: GPMOptions

    def __init__(self, options: GPMOptions):
        super().__init__(options)
        self._kept: dict[str, Basis] = {}  # of trained A, where they are: on a GPU moved there once, not at every step

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradients"}) if self.options.mode == "grad" else frozenset()

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate kept bases beside the parameters while these train."""
        return {**self.options.footprint(sizes), "train": {"kept bases": sizes.kept_bases()}}

    def prepare(self, context: Context) -> None:
        begin_kept(context)

    def before_domain(self, context: Context) -> Branch:
        self._kept = {}
        branch = fresh_branch(context, self.options)
        A = {layer: _outside(rows, context.kept[layer]) for layer, rows in branch.A.items()}
        return branch_outside(context, self.options, A, branch.train)

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        if phase != self.options.mode:
            return
        trained = context.branches.trainable()
        if not self._kept:
            for layer, kept in context.kept.items():
                name = f"base_model.model.{layer}.lora_A.domain.weight"
                if kept.rank and name in trained:
                    self._kept[name] = kept.to(trained[name].device)
        for name, kept in self._kept.items():
            gradient = trained[name].grad
            if phase == "post":
                context.edit_parameter(name, kept.residual)
            elif gradient is not None:
                gradient.copy_(kept.residual(gradient))

    def after_domain(self, context: Context) -> None:
        self._kept = {}
        grow_kept(context, self.options)


def _outside(rows: Tensor, kept: Basis) -> Tensor:
    """Rows (r, d_in) of A without their part inside a basis, as long as before; no more than there are dimensions."""
    if kept.rank == 0:
        return rows
    rows = rows[: kept.d_in - kept.rank]
    free = kept.residual(kept.residual(rows))  # twice: what rounding left inside would be stretched below
    return free * (rows.norm(dim=1) / free.norm(dim=1)).unsqueeze(1)
