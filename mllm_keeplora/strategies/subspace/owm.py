"""OWM-LoRA: take out of every step of A what past inputs would hear, softly, by recursive least squares.

P starts as I and takes in the inputs x of each finished domain, one after another (a whole domain at once gives the
same):

    P <- P - P x x^T P / (a + x^T P x),   so that   P = (I + sum_t X_t^T X_t / a_t)^-1

From the second domain on a fresh branch starts at A P, each row as long as before, and every change that a step makes
to A is multiplied by P. B trains freely: B A x is small where past inputs have energy, in proportion to it. GPM cuts a
subspace off where this shrinks, and its A may be projected again and again, as P here may not.

Source: Orthogonal Weights Modification (Nature Machine Intelligence 2019, arXiv 1810.01256), whose rule G <- G P is for
full weights and plain gradient descent (`mode: grad`). The branch is our own adaptation.
Departures: the change is multiplied, not the gradient, which leaks under Adam (`mode: post`). P takes in every token
after a domain; published are the means of batches, while it is trained. a is relative: `ridge` times the mean of a
domain's summed squares over dimensions, so that domains count alike whatever their lengths. First tokens of texts are
left out, as their activations may be huge.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.probes.plans import FeaturePlan, by_identity
from mllm_keeplora.strategies.base import Branch, Context, Need, Samples, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import ALWAYS, Footprint, PassSizes, feature_pass

if TYPE_CHECKING:
    from torch import Tensor


class OWMOptions(StrategyOptions):
    """Nothing is published for LLaVA: rank and alpha are plain LoRA's, and `ridge` is our choice."""

    mode: Literal["post", "grad"] = "post"  # grad is exact for gradient descent without adaptive scaling alone
    ridge: float = Field(1e-3, gt=0.0, description="energy of a direction, of the mean one, at which P halves it")
    feature_samples: Samples = 512
    first_token: bool = Field(False, description="whether P takes in the first token of a text")


class OWM(Strategy):
    """Stores the branches, and to go on P (d_in, d_in) of every distinct input: 20 GiB for all of LLaVA-1.5-7B."""

    Options: ClassVar[type[StrategyOptions]] = OWMOptions
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    options: OWMOptions

    def __init__(self, options: OWMOptions):
        super().__init__(options)
        self.load_state_dict({})

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate P of every distinct input, and the pass that it grows by."""
        projections = {"projections": 4 * sum(d_in**2 for d_in in sizes.base.input_widths)}
        return {ALWAYS: projections, "train": projections, "consolidate": feature_pass(sizes)}

    def before_domain(self, context: Context) -> Branch:
        self._held = {}
        branch, A = fresh_branch(context, self.options), {}
        for layer, rows in branch.A.items():
            free = rows @ self.P[layer] if layer in self.P else rows
            A[layer] = free * (rows.norm(dim=1) / free.norm(dim=1)).unsqueeze(1)
        return replace(branch, A=A) if self.P else branch

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        if not self.P:
            return
        trained = context.branches.trainable()
        if not self._held:
            moved = {id(P): P.to(next(iter(trained.values())).device) for P in self.P.values()}
            self._held = {f"base_model.model.{n}.lora_A.domain.weight": moved[id(P)] for n, P in self.P.items()}
        for name, P in self._held.items():
            gradient = trained[name].grad
            if self.options.mode == "grad":
                if phase == "grad" and gradient is not None:
                    gradient.copy_(gradient @ P)
            elif phase == "grad":
                self._before[name] = trained[name].detach().clone()
            else:
                before = self._before.pop(name)
                context.edit_parameter(name, lambda now, before=before, P=P: before + (now - before) @ P)

    def after_domain(self, context: Context) -> None:
        """Let every P take in the domain's inputs, once for all layers that have had one input now and before."""
        features = context.passes.features(self.options.feature_samples, FeaturePlan(first=self.options.first_token))
        groups: dict[tuple[int, int], list[str]] = {}
        for layer, each in features.items():
            groups.setdefault((id(each), id(self.P.get(layer))), []).append(layer)

        def grow(layer: str, source: Any) -> Tensor:
            return taken_in(self.P.get(layer), source.moments, self.options.ridge)

        found = context.processes.dealt(features.get, grow, [layers[0] for layers in groups.values()])
        for layers in groups.values():
            self.P.update(dict.fromkeys(layers, found[layers[0]]))
        self._held = {}
        context.log({"free_share": {layer: float(P.diagonal().mean()) for layer, P in found.items()}})

    def state_dict(self) -> dict[str, Tensor]:
        return {"|".join(layers): self.P[layers[0]] for layers in by_identity(self.P)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.P: dict[str, Tensor] = {}  # layer -> P on the CPU, one object for layers with one input
        for layers, P in state.items():
            self.P.update(dict.fromkeys(layers.split("|"), P))
        self._held: dict[str, Tensor] = {}  # trained A -> P beside it
        self._before: dict[str, Tensor] = {}  # trained A -> as it was before the step


def taken_in(P: Tensor | None, moments: Tensor, ridge: float) -> Tensor:
    """Let P take in a domain: (P^-1 + X^T X / a)^-1, from the (d_in, d_in) sum or mean X^T X of its inputs.

    Returns:
        float32 on the CPU, symmetric; P may be None for I.
    """
    import torch

    S = moments.double()
    S = S / (ridge * S.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    P = torch.eye(len(S), dtype=S.dtype, device=S.device) if P is None else P.to(S)
    P = torch.linalg.solve(torch.eye(len(S), dtype=S.dtype, device=S.device) + P @ S, P)
    return ((P + P.mT) / 2).float().cpu()
