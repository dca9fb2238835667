"""Ortho-LoRA: where gradients of domains run against each other they give that part up, in each A and each B alone.

One low-rank branch is trained on from domain to domain. Before every step the gradient G_1 of the batch meets those of
the mean losses on random records of a buffer, one G_i for each earlier domain among them. In every trained matrix

    H_i = G_i;  for each j != i, in random order:  if <H_i, G_j> < 0:  H_i <- H_i - <H_i, G_j> / ||G_j||^2 G_j

and the step descends sum_i w_i H_i, where w_i is the domain's share of the step's records (replay weighs by tokens).
Clipping and Adam come after it. Nothing of it is needed to answer.
Source: Ortho-LoRA (arXiv 2601.09684), by its abstract and third-party notes: PCGrad (arXiv 2001.06782) in each LoRA
factor. No official code was found, and third parties saw little gain.
Departures: published is joint training; here earlier domains are in a buffer. What "each factor" takes together, the
order and the weights are unknown: a matrix by itself (`granularity`), one order a step for all. `mode: one_sided` lets
the batch alone give up and learns nothing from buffered records; with `granularity: global` and one earlier domain it
is A-GEM. Gradients of buffered records are without dropout.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.strategies.base import Context, Need, Step, StrategyOptions
from mllm_keeplora.strategies.baselines.buffered import Buffered, BufferOptions
from mllm_keeplora.strategies.footprint import Footprint, PassSizes

if TYPE_CHECKING:
    from torch import Tensor


class OrthoLoRAOptions(BufferOptions):
    """No buffer is published; a `ratio` of 1 keeps a step at about twice the cost."""

    mode: Literal["symmetric", "one_sided"] = "symmetric"
    granularity: Literal["matrix", "factor", "global"] = Field(
        "matrix", description="what meets as one vector: each matrix; all A, all B; everything"
    )


class OrthoLoRA(Buffered):
    """Stores the branch, and domain and number of each record in the buffer; the records stay where they are."""

    Options: ClassVar[type[StrategyOptions]] = OrthoLoRAOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    options: OrthoLoRAOptions

    def __init__(self, options: StrategyOptions):
        super().__init__(options)
        self.load_training_state({})

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate the graph, as buffered records come by data passes, and a gradient for each domain."""
        graph = sizes.graph(max(sizes.micro, sizes.probe), sizes.rank)
        return {"train": {"graph": graph, "gradients of domains": 4 * sizes.numbers * sizes.domains}}

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        """Put in the place of the gradient what domains descend together once no one's runs against another's."""
        import torch

        from mllm_keeplora.linalg.surgery import without_conflicts

        if phase == "post" or not len(self.buffer):
            return
        trained = context.branches.trainable()
        gradients, weights = self._of_domains(context, step)
        orders = self._orders(len(gradients), step)
        for names in self._together(trained):
            given = [torch.cat([each[name].flatten() for name in names]) for each in gradients]
            found = without_conflicts(given, orders)
            self.met += torch.tensor([sum(a is not b for a, b in zip(found, given, strict=True)), len(given)])
            together = sum(weight * each for weight, each in zip(weights, found, strict=True) if weight)
            for name, part in zip(names, together.split([trained[name].numel() for name in names]), strict=True):
                trained[name].grad = part.view_as(trained[name]).to(trained[name])

    def after_domain(self, context: Context) -> None:
        super().after_domain(context)
        cut, met = self.met.tolist()
        if met:
            context.log({"gradients_cut": cut / met})  # how often surgery did anything

    def training_state(self) -> dict[str, Tensor]:
        return {"met": self.met}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        import torch

        self.met: Tensor = state.get("met", torch.zeros(2, dtype=torch.int64)).clone()  # gradients that were cut; all

    def _of_domains(self, context: Context, step: Step) -> tuple[list[dict[str, Tensor]], list[float]]:
        """Gradients of the domain and of each earlier one that the step draws, by parameter; their weights."""
        import torch

        own, drawn = self.drawn(step), self.drawn(replace(step, share=(0, 1)))  # all processes know of the same domains
        trained = context.branches.trainable()
        gradients = [{name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}]
        records = [step.records]
        for domain in sorted({domain for domain, _ in drawn}):
            gradients.append(context.passes.loss_gradients([each for each in own if each[0] == domain]))
            records.append(sum(each[0] == domain for each in drawn))
        if self.options.mode == "one_sided":
            return gradients, [1.0] + [0.0] * (len(records) - 1)
        return gradients, [count / sum(records) for count in records]

    def _orders(self, count: int, step: Step) -> list[list[int]]:
        """For each domain the others, as it meets them in this step."""
        draws, orders = random.Random(f"order {step.seed} {step.number}"), []
        for one in range(count):
            others = [other for other in range(count) if other != one]
            draws.shuffle(others)
            orders.append(others if one == 0 or self.options.mode == "symmetric" else [])
        return orders

    def _together(self, names: Iterable[str]) -> list[list[str]]:
        """Names of the parameters whose gradients meet as one vector; what trains in full is no factor's."""
        groups: dict[str, list[str]] = {}
        for name in names:
            factor = next((mark for mark in (".lora_A.", ".lora_B.") if mark in name), "")
            key = {"matrix": name, "factor": factor, "global": ""}[self.options.granularity]
            groups.setdefault(key, []).append(name)
        return list(groups.values())
