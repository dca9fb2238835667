"""LoDA: learn where old and new inputs have energy together and where the new have it alone; keep what old can bear.

Second moments S = X^T X / n of a layer's inputs: S_new of the new domain, S_old summed over the finished ones. From the
second domain on

    A_G = U_G^T / sqrt(3),  U_G the leading eigenvectors of S_old + S_new                   (general)
    A_I = U_I^T / sqrt(3),  U_I = QR(U),  S_new u = mu (S_old + eps I) u, largest mu        (isolated)
    y = W x + w_G B_G A_G x + w_I B_I A_I x,  B = 0 at first; B alone trains

and after it, with S_new anew, B_G Lambda answers in the place of B_G:

    Lambda = diag(gamma g_new / (g_old + gamma g_new)),  g = a S a^T for each row a of A_G        (`diagonal`)
    Lambda = gamma G_new (G_old + gamma G_new)^+,  G = A_G S A_G^T                                (`full`)

The first domain has A_G alone, trains it and B_G, and is not recalibrated. With `rho_max` > 0 steps look ahead, so that
halves of a batch agree (`aligned`).

Source: LoDA (ICML 2026, arXiv 2603.00191), its code, and third-party notes. Weights w are those in effect where both
branches are on; the code may give the first domain twice w_G. It adds a domain to S_old twice, before and after the
recalibration (`stats_per_task: double`).
Departures: the loss is this toolkit's. The ridge eps is relative to the mean diagonal of S_old. Moments leave
out padding and, as its activations may be huge, the first token of a text. Those of steps are at `aligned`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.adapters import Factors
from mllm_keeplora.errors import UserError
from mllm_keeplora.probes.plans import FeaturePlan, by_identity
from mllm_keeplora.strategies.base import Branch, Context, Need, Samples, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.footprint import ALWAYS, Footprint, PassSizes, feature_pass
from mllm_keeplora.strategies.subspace.aligned import HELD, Partition, replace_gradients

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.probes.plans import Features

ROW = 1 / math.sqrt(3)  # length of a row of A, as plain LoRA starts it
SOLVING = 8  # float64 matrices of the largest width alive in the generalised eigenproblem
TRAINED = 16  # bytes for a number that trains: itself, its gradient, and Adam's two


class LoDAOptions(StrategyOptions):
    """Nothing is published for LLaVA; weights, gamma and presets are those of the published code for ViT.

    `rank` is of the general branch. alpha / rank multiplies both weights, and is 1 as published. The default of
    `rho_max`, an absolute length in each tensor, is our choice; 0 leaves steps plain. Else a step takes up to five
    times as long.
    """

    rank: int = Field(32, ge=1)
    alpha: float = Field(32.0, gt=0.0)
    isolated_rank: int | None = Field(None, ge=0, description="null: as `rank`; 0: no isolated branch")
    general_weight: float = Field(0.25, gt=0.0)
    isolated_weight: float = Field(0.5, gt=0.0)
    recalibration: Literal["diagonal", "full", "none"] = "diagonal"
    gamma: float = Field(3.0, gt=0.0, description="how much new inputs count in the recalibration")
    stats_per_task: Literal["post_merge", "double"] = "post_merge"
    rho_max: float = Field(0.05, ge=0.0, description="longest step ahead, in the norm of a tensor")
    partition: Partition = "answer"
    feature_samples: Samples = 512
    first_token: bool = Field(False, description="whether moments count the first token of a text")

    @property
    def isolated(self) -> int:
        return self.rank if self.isolated_rank is None else self.isolated_rank

    def refuse_unfit(self, sizes: Mapping[str, tuple[int, int]], towers: Mapping[str, str | None]) -> None:
        layer, d_in = min(((layer, d_in) for layer, (_, d_in) in sizes.items()), key=lambda each: each[1])
        for name, rank in (("rank", self.rank), ("isolated_rank", self.isolated)):
            if d_in < rank:
                raise UserError(
                    f"strategy.{name} is {rank}, but rows of A must be orthonormal and {layer} has {d_in} inputs; "
                    f"allowed: at most {d_in}"
                )


class LoDA(Strategy):
    """Stores per domain the trained and the recalibrated branch, and to go on the moments of every distinct input.

    These are (d_in, d_in): 20 GiB in float32 for all layers of LLaVA-1.5-7B, 6 GiB without those of `down_proj`.
    """

    Options: ClassVar[type[StrategyOptions]] = LoDAOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "official": {"rho_max": 0.3, "stats_per_task": "double"},
        "official-imagenet-r": {"rank": 64, "alpha": 64.0, "rho_max": 0.7, "stats_per_task": "double"},
    }
    options: LoDAOptions

    def __init__(self, options: LoDAOptions):
        super().__init__(options)
        self.load_state_dict({})
        self.load_training_state({})

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gradients"}) if self.options.rho_max else frozenset()

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate feature passes, eigenproblems and moments of the past; what later branches take beyond the first."""
        passed, options = feature_pass(sizes), self.options
        widest = max(d_in for _, d_in in sizes.layers)
        summed = sizes.moment * sum(d_in**2 for d_in in sizes.base.input_widths)
        outputs, inputs = (sum(each) for each in zip(*sizes.layers, strict=True))
        beyond = options.isolated * (TRAINED * outputs + 4 * inputs) - options.rank * (TRAINED - 4) * inputs
        train = {"isolated branch": max(0, beyond)}
        if options.rho_max:
            train["steps ahead"] = HELD * 4 * sizes.numbers
        return {
            "gradient": {**passed, "decomposition": SOLVING * 8 * widest**2},
            "train": train,
            "consolidate": passed,
            ALWAYS: {"summed moments": summed},
        }

    def before_domain(self, context: Context) -> Branch:
        import torch

        from mllm_keeplora.linalg import general_directions, isolated_directions, orthonormal_rows

        options, first = self.options, not self.moments
        weights = (options.general_weight,) if first else (options.general_weight, options.isolated_weight)

        def begin(layer: str, new: Tensor, old: Tensor | None) -> Tensor:
            A = [general_directions(new if old is None else new + old, options.rank).mT]
            if old is not None and options.isolated:
                A.append(orthonormal_rows(isolated_directions(old, new, options.isolated)[0].mT)[0])
            # A branch has one scale: rows are as long as their weight, whose share of it they carry.
            longest = max(weights)
            return ROW * torch.cat([w / longest * rows for w, rows in zip(weights, A, strict=False)]).float().cpu()

        found = self._by_input(context, self._look(context), begin)
        A = {layer: found[layer].clone() for layer in context.layers.names}
        scaling = options.alpha / options.rank * max(weights)
        return Branch(A, {layer: scaling * len(rows) for layer, rows in A.items()}, ("A", "B") if first else ("B",))

    # -- steps that look ahead ------------------------------------------------------------------------------------

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Begin a training: micro-batches are held for a step alone."""
        self.number, self.taken = -1, []

    def batch(self, context: Context, batch: dict[str, Any], step: Step) -> dict[str, Any]:
        if self.options.rho_max:
            if step.number != self.number:
                self.number, self.taken = step.number, []
            self.taken.append(batch)
        return batch

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        if phase == "grad" and self.options.rho_max:
            replace_gradients(context, self.taken, step, self.options.rho_max, self.options.partition)
            self.taken = []

    # -- after a domain -------------------------------------------------------------------------------------------

    def after_domain(self, context: Context) -> None:
        options = self.options
        trained, changes = context.branches.read(), bool(self.moments) and options.recalibration != "none"
        before = self._look(context) if changes or options.stats_per_task == "double" else None
        if not changes:
            after = before or self._look(context)
        else:
            answering = self._recalibrated(context, trained, before)
            full = context.branches.read_full()
            context.branches.load(answering, full)
            after = self._look(context)
            context.branches.load(trained, full)
            context.answer_as(self._orthonormal(answering))
        seen = [before, after] if options.stats_per_task == "double" else [after]
        for features in seen:
            self._add(features)

    def _recalibrated(self, context: Context, trained: Factors, features: Features) -> Factors:
        """Give the branch with B_G Lambda in the place of B_G."""
        import torch

        from mllm_keeplora.linalg import recalibration

        options, rank = self.options, self.options.rank

        def keep(layer: str, new: Tensor, old: Tensor) -> Tensor:
            A = trained.A[layer][:rank].to(new)
            return recalibration(A, old, new, options.gamma, options.recalibration == "full").float().cpu()

        kept = self._by_input(context, features, keep)
        B = {
            layer: torch.cat([each[:, :rank] @ kept[layer], each[:, rank:]], dim=1) for layer, each in trained.B.items()
        }
        shares = [float(each.diagonal().mean()) for each in kept.values()]
        context.log({"recalibration": {"mean": sum(shares) / len(shares), "min": min(shares), "max": max(shares)}})
        return Factors(trained.A, B, trained.alpha)

    def _orthonormal(self, factors: Factors) -> Factors:
        """Give the same branch with rows of equal length, its weights in B."""
        rank, top = self.options.rank, max(self.options.general_weight, self.options.isolated_weight)
        weights = self.options.general_weight / top, self.options.isolated_weight / top
        A, B = {}, {}
        for layer, rows in factors.A.items():
            w = rows.new_tensor([weights[place >= rank] for place in range(len(rows))])
            A[layer], B[layer] = rows / w[:, None], factors.B[layer] * w
        return Factors(A, B, factors.alpha)

    # -- moments --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        return {"|".join(layers): self.moments[layers[0]] for layers in by_identity(self.moments)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back sums of moments, one object for layers with one input."""
        self.moments: dict[str, Tensor] = {}
        for layers, tensor in state.items():
            self.moments.update(dict.fromkeys(layers.split("|"), tensor))

    def _look(self, context: Context) -> Features:
        return context.passes.features(self.options.feature_samples, FeaturePlan(first=self.options.first_token))

    def _add(self, features: Features) -> None:
        for layers in self._inputs(features):
            new, old = _mean(features[layers[0]]), self.moments.get(layers[0])
            self.moments.update(dict.fromkeys(layers, (new if old is None else new + old.to(new)).cpu()))

    def _inputs(self, features: Features) -> list[list[str]]:
        """Group layers that have had one input now and before."""
        groups: dict[tuple[int, int], list[str]] = {}
        for layer, each in features.items():
            groups.setdefault((id(each), id(self.moments.get(layer))), []).append(layer)
        return list(groups.values())

    def _by_input(self, context: Context, features: Features, work: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Do a piece of work for each distinct input, with its new and old moments; all its layers get the result."""
        groups = {layers[0]: layers for layers in self._inputs(features)}

        def do(layer: str, source: Any) -> Tensor:
            new, old = _mean(source), self.moments.get(layer)
            return work(layer, new, None if old is None else old.to(new))

        found = context.processes.dealt(features.get, do, groups)
        return {layer: found[first] for first, layers in groups.items() for layer in layers}


def _mean(moments: Any) -> Tensor:
    return moments.moments / max(1, moments.count)
