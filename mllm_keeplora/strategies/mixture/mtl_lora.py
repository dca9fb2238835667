"""MTL-LoRA: a shared A, a transform for each domain, and its softmax over up-projections, of which each adds one.

In a layer, for questions of domain t, which must be told when they are asked,

    y = W x + alpha / r * ( sum_{i <= t} softmax(w_t / tau)_i B_i ) Lambda_t A x

The first domain trains A, B_1 and Lambda_1; each later one B_t, Lambda_t and w_t beside fixed A and B_1 .. B_{t-1}.
So earlier domains answer as they did: nothing is forgotten, and the B of a domain serves those that come after it.
Lambda_t begins as the identity, B_t at zero, w_t uniform within 1 / sqrt(t): the first domain begins at the base, a
later one at a mean of what earlier B do. What answers is the domain's pair (Lambda_t A, sum_i p_i B_i), p the softmax,
which is plain LoRA and merges and exports as such; the base answers what was not learnt. The method itself needs less
than these pairs: A once, and of each domain B_t, r^2 and t numbers a layer.
Source: MTL-LoRA (AAAI 2025, arXiv 2410.09437) and its code (pUmpKin-Co/MTL-LoRA).
Departures: published is multi-task training of all of it at once, with 2 or 3 B. The continual use above is ours; it
has a B for each domain since several that start at zero would take much the same steps in one domain alone. Batches are
of one domain. Biases and layer norms are not trained.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.adapters import Factors
from mllm_keeplora.strategies.base import Branch, Context, Need, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP = "A|", "B|"


class MTLLoRAOptions(StrategyOptions):
    """Rank and alpha are those published for LLaMA, tau is that of image and text (VL-BART).

    The presets are these two. LLaMA's tau of 0.1 may leave a new B without any share to learn from.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0.0)
    temperature: float = Field(0.8, gt=0.0, description="tau")
    lambda_format: Literal["full", "diag"] = Field("full", description="Lambda has r^2 numbers, or its diagonal alone")


class MTLLoRA(Strategy):
    """Stores one branch a domain; to go on, A and the B of every domain."""

    Options: ClassVar[type[StrategyOptions]] = MTLLoRAOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llama": {"rank": 8, "alpha": 16.0, "temperature": 0.1},
        "vl_bart": {"rank": 64, "alpha": 16.0, "temperature": 0.8},
    }
    start_from: ClassVar[Literal["base"]] = "base"
    combine: ClassVar[Literal["oracle"]] = "oracle"
    needs_domain_id: ClassVar[bool] = True
    # Transforms run inside of other layers, for which ZeRO-3 would have to fetch their numbers in between.
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: MTLLoRAOptions

    def __init__(self, options: StrategyOptions):
        super().__init__(options)
        self.load_state_dict({})

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate the up-projections of earlier domains."""
        up = 4 * sizes.rank * sum(d_out for d_out, _ in sizes.layers)
        return {"train": {"earlier up-projections": up * (sizes.domains - 1)}}

    def before_domain(self, context: Context) -> Branch:
        import torch

        from mllm_keeplora.adapters.mixers.transforms import Transforms

        options, earlier = self.options, context.domain.index
        branch = fresh_branch(context, options)
        sizes = {layer: (options.rank, context.layers.d_out(layer)) for layer in branch.A}
        mixer = Transforms(sizes, earlier=earlier, temperature=options.temperature, form=options.lambda_format)
        bound = 1 / math.sqrt(earlier + 1)
        with torch.no_grad():
            for layer in sizes:
                part = mixer.layer(layer)
                part.logits.uniform_(-bound, bound, generator=context.rng)
                if earlier:
                    part.earlier.copy_(self.ups[layer])
        if earlier:
            A = {layer: self.A[layer] for layer in branch.A}  # in its order, which files of tensors do not keep
            branch = replace(branch, A=A, train=("B",))
        return replace(branch, mixer=mixer)

    def after_domain(self, context: Context) -> None:
        """Let the domain's own pair answer, and keep its B for those that follow."""
        import torch

        trained, mixer = context.branches.read(), context.branches.mixer
        pairs = {layer: mixer.folded(layer, A, trained.B[layer]) for layer, A in trained.A.items()}
        A, B = ({layer: pair[place] for layer, pair in pairs.items()} for place in (0, 1))
        context.answer_as(Factors(A, B, trained.alpha))
        self.A = trained.A
        for layer, up in trained.B.items():
            self.ups[layer] = torch.cat([self.ups[layer], up[None]]) if layer in self.ups else up[None]
        shares = torch.stack([mixer.layer(layer).shares.detach().cpu() for layer in pairs])
        context.log({"mean_shares": shares.mean(dim=0).tolist()})

    def state_dict(self) -> dict[str, Tensor]:
        return {DOWN + layer: A for layer, A in self.A.items()} | {UP + layer: B for layer, B in self.ups.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.A, self.ups = (
            {name.removeprefix(mark): each for name, each in state.items() if name.startswith(mark)}
            for mark in (DOWN, UP)
        )
