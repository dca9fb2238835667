"""DAC: a branch is a pool of rank-1 experts; records vote for those that a step trains, and the most used are merged.

With a_i the rows of A, b_i the columns of B, phi(x) what a layer receives of a question x, a step has in each layer

    y = W x + alpha / r * sum_{i in M} b_i a_i^T x,   M = the k experts with the most votes of the step's questions

Each question votes for its k likeliest by softmax(R phi(x) + c), R and c random and fixed; n_i counts votes of the
domain. Beside the loss stands AGO, lambda |b_i^T p_j|: its mean over the k' experts i with the most votes so far and
the columns p_j that earlier domains kept, then over layers. After a domain the k' experts with the most votes are
merged, and the others dropped.

Source: DAC, "Rank-1 Expert Pool in a Single LoRA" (AAAI 2026, arXiv 2601.22828), its code for CLIP, and a summary of
the paper. As in the code, routers choose but get no gradient (`router_grad: straight_through` is ours), and experts
that are not in use still move by weight decay and by Adam's momentum. AGO is a sum over pairs there, a mean in the
summary, where it may have a sign; here it is never negative.
Departures: phi in the code is the token at position 0, in the training's own forward. In a causal model that token has
seen nothing but itself; phi is the mean over a question's tokens, but for the first and those from its answer on, in a
forward before the step without the open branch, which takes a third to a half more time (`phi: inputs`), or what frozen
parts see, for all layers alike (`phi: question`). So a record's votes depend on it alone, and masks on all records of a
step, in whatever micro-batches and processes. Of equal experts the first is taken. In a text tower the texts of a
micro-batch's classes vote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from mllm_keeplora.adapters import Factors
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.base import Branch, Context, Need, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes

if TYPE_CHECKING:
    from torch import Tensor


class DACOptions(StrategyOptions):
    """`rank` is the number of experts. Nothing is published for LLaVA; shares of it are those published for CLIP."""

    active: int | None = Field(None, ge=1, description="k, experts in use; null: two thirds of the rank")
    kept: int | None = Field(None, ge=1, description="k', merged after a domain; null: a third of the rank")
    strength: float = Field(0.1, ge=0.0, description="lambda, of AGO")
    reduction: Literal["mean", "sum"] = Field("mean", description="of AGO over pairs; the code has the sum")
    phi: Literal["inputs", "question"] = Field("inputs", description="what routers see of a question")
    router_grad: Literal["none", "straight_through"] = "none"

    @field_validator("active", "kept")
    @classmethod
    def _no_more_than_there_are(cls, value: int | None, info: ValidationInfo) -> int | None:
        rank = info.data.get("rank", value)
        if value is not None and value > rank:
            raise ValueError(f"must be at most strategy.rank {rank}, the number of experts")
        return value

    @property
    def in_use(self) -> int:
        return self.active or max(1, round(2 * self.rank / 3))

    @property
    def to_keep(self) -> int:
        return self.kept or max(1, round(self.rank / 3))

    def refuse_unfit(self, sizes: Mapping[str, tuple[int, int]], towers: Mapping[str, str | None]) -> None:
        if self.phi == "question" and not {"vision", "text"}.isdisjoint(towers.values()):
            raise UserError("strategy.phi is 'question', but both towers of a dual encoder learn; allowed: 'inputs'")


class DAC(Strategy):
    """Stores per domain the trained branch, and the experts of it that answer; AGO reads the B of those."""

    Options: ClassVar[type[StrategyOptions]] = DACOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"rank": 12, "alpha": 1.0, "active": 8, "kept": 4, "reduction": "sum"}
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: DACOptions

    def __init__(self, options: DACOptions):
        super().__init__(options)
        self.load_training_state({})

    def footprint(self, sizes: PassSizes) -> Footprint:
        of_question = [sizes.question[0]] * len(sizes.layers)
        widths = [d_in for _, d_in in sizes.layers] if self.options.phi == "inputs" else of_question
        return {"train": {"routers": 4 * sizes.rank * sum(width + 1 for width in widths)}}

    def before_domain(self, context: Context) -> Branch:
        from mllm_keeplora.adapters.mixers.pool import Pool

        options, branch = self.options, fresh_branch(context, self.options)
        inputs = {layer: A.shape[1] for layer, A in branch.A.items()}
        if options.phi == "question":
            inputs = dict.fromkeys(inputs, sum(context.passes.feature_sizes()))
        pool = Pool(options.rank, options.in_use, inputs, options.router_grad == "straight_through")
        pool.begin(context.rng)
        return replace(branch, mixer=pool)

    # -- votes ----------------------------------------------------------------------------------------------------

    def batch(self, context: Context, batch: dict[str, Any], step: Step) -> dict[str, Any]:
        """Let a micro-batch's questions vote; the experts in use are those of all that have voted in the step."""
        pool = context.branches.mixer
        if step.number != self.number:
            self.number, self.votes = step.number, 0
        with pool.silent():
            features = context.passes.question_inputs(context.data.placed(batch), self.options.phi == "question")
        if pool.learns:
            pool.seen.append({layer: given for layer, (given, _) in features.items()})
        own = pool.votes(features)
        context.processes.reduce([own])
        self.votes, self.counts = self.votes + own, own if self.counts is None else self.counts + own
        pool.use(self.votes)
        return batch

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.counts is None else {"counts": self.counts}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take back the domain's votes; those of a step are counted anew."""
        self.number, self.votes, self.counts = -1, 0, state.get("counts")
        self._columns: dict[str, tuple[Tensor, Tensor]] = {}  # layer -> B and all earlier columns, where B is

    # -- AGO, and what is kept ------------------------------------------------------------------------------------

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        from mllm_keeplora.adapters.mixers.pool import leading

        if not self.options.strength or not context.branches.past:
            return 0.0
        if not self._columns:
            self._columns = _columns(context)
        current = leading(self.counts, self.options.to_keep)
        found = [
            overlap(B[:, chosen.to(B.device)], past, self.options.reduction)
            for (B, past), chosen in zip(self._columns.values(), current, strict=True)
        ]
        return self.options.strength * sum(found) / len(found)

    def after_domain(self, context: Context) -> None:
        """Answer with the experts that had the most votes, and log how evenly votes fell: 1 where all had as many."""
        from mllm_keeplora.adapters.mixers.pool import leading

        trained, keep = context.branches.read(), self.options.to_keep
        chosen = dict(zip(context.layers.names, leading(self.counts, keep), strict=True))
        A = {layer: each[chosen[layer]] for layer, each in trained.A.items()}
        B = {layer: each[:, chosen[layer]] for layer, each in trained.B.items()}
        share = keep / self.options.rank
        context.answer_as(Factors(A, B, {layer: share * alpha for layer, alpha in trained.alpha.items()}))
        spread = evenness(self.counts).tolist()
        context.log({"votes": {"evenness": sum(spread) / len(spread), "min": min(spread), "max": max(spread)}})


def overlap(current: Tensor, past: Tensor, reduction: str) -> Tensor:
    """Measure how far output directions overlap: |current^T past|, its mean or sum over pairs of columns.

    Args:
        current, past: (d_out, m) being trained, and (d_out, n) float32, fixed.
        reduction: `mean` or `sum`.
    """
    products = (current.float().mT @ past).abs()
    return products.mean() if reduction == "mean" else products.sum()


def evenness(counts: Tensor) -> Tensor:
    """Give the entropy of each row of counts (n, experts) as a share of the largest there is; 1 without any votes."""
    import torch

    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(shares).sum(dim=1) / math.log(max(2, counts.shape[1]))
    return torch.where(counts.sum(dim=1) > 0, entropy, 1.0)


def _columns(context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """B as a parameter, and the columns that earlier domains kept beside it, by layer."""
    import torch

    trained, past, found = context.branches.trainable(), context.branches.past, {}
    for layer in context.layers.names:
        B = trained[f"base_model.model.{layer}.lora_B.domain.weight"]
        found[layer] = B, torch.cat([factors.B[layer] for factors in past], dim=1).to(B.device)
    return found
