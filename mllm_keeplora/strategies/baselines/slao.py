"""SLAO: merge before forget. One LoRA trains on from an orthonormal A, and a running blend of B answers.

Domain i = 1 trains plain LoRA. Each later one begins at the pristine base and

    A_i = Q^T,  Q R = A_{i-1}^T (reduced QR, diagonal of R not negative),  B_i = B_{i-1},   both as they were TRAINED

and trains both. What answers is A = A_i and

    B_mg,i = B_mg,i-1 + lambda(i) (B_i - B_mg,i-1),  lambda(1) = 1,  lambda(i) = 1 / sqrt(i)

Source: SLAO, "Merge before Forget" (ICLR 2026, arXiv 2512.23017), by third-party notes and a reproduction's report; no
official code was found. The restart does not preserve the function that was learnt (B Q^T is not B R^T Q^T); this is
the published rule. In the blend B_k has the weight w_k = lambda(k) prod_{j > k} (1 - lambda(j)) (see the records):
0.02 is left of the first after six domains.
Departures: rank and alpha are this toolkit's; published are rank 8 (preset `published`) on q and v, alpha is unknown.
`schedule: linear` and `constant`, and `compensate_R`, are ours. A projector trained in full is carried on, not blended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.adapters import Factors
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.base import Branch, Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes

if TYPE_CHECKING:
    from torch import Tensor


class SLAOOptions(StrategyOptions):
    schedule: Literal["sqrt", "linear", "constant"] = Field("sqrt", description="lambda(i): 1/sqrt(i), 1/i, or `rate`")
    rate: float = Field(0.5, gt=0.0, le=1.0, description="of the new B from the second domain on, if constant")
    compensate_R: bool = Field(False, description="begin at B R^T, with which the restart preserves the function")

    def refuse_unfit(self, sizes: Mapping[str, tuple[int, int]], towers: Mapping[str, str | None]) -> None:
        layer, d_in = min(((layer, d_in) for layer, (_, d_in) in sizes.items()), key=lambda each: each[1])
        if d_in < self.rank:
            raise UserError(
                f"strategy.rank is {self.rank}, but rows of A must be orthonormal and {layer} has {d_in} inputs; "
                f"allowed: at most {d_in}"
            )

    def share(self, number: int) -> float:
        """Give lambda(i), the share of a domain's B in the blend, by its number from one."""
        if number == 1:
            return 1.0
        return {"sqrt": 1 / math.sqrt(number), "linear": 1 / number, "constant": self.rate}[self.schedule]

    def weights(self, count: int) -> list[float]:
        """Give the weight of every domain's B in the blend after so many domains."""
        shares = [self.share(number) for number in range(1, count + 1)]
        return [share * math.prod(1 - later for later in shares[place + 1 :]) for place, share in enumerate(shares)]


class SLAO(Strategy):
    """Stores the branch that answers, and to go on the last one as it was trained."""

    Options: ClassVar[type[StrategyOptions]] = SLAOOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {"rank": 8}}
    recalls: ClassVar[Literal["last"]] = "last"
    options: SLAOOptions

    def footprint(self, sizes: PassSizes) -> Footprint:
        numbers = max(d_in for _, d_in in sizes.layers) * sizes.rank
        return {"gradient": {"restart": 4 * 3 * numbers}}

    def prepare(self, context: Context) -> None:
        layers = context.layers
        sizes = {layer: (layers.d_out(layer), layers.d_in(layer)) for layer in layers.names}
        self.options.refuse_unfit(sizes, {})

    def before_domain(self, context: Context) -> Branch:
        from mllm_keeplora.linalg import orthonormal_rows

        if context.domain.index == 0:
            return carried_branch(context, self.options)
        last, _ = context.trained(context.domain.index - 1)
        A: dict[str, Tensor] = {}
        B = dict(last.B)
        for layer, trained in last.A.items():
            A[layer], R = orthonormal_rows(trained.float())
            if self.options.compensate_R:
                B[layer] = (B[layer].float() @ R.mT).to(B[layer].dtype)
        return Branch(A, last.alpha, ("A", "B"), B, carried=True)  # in place of the past: it begins at the base

    def after_domain(self, context: Context) -> None:
        number = context.domain.index + 1
        context.log({"blend": self.options.weights(number)})
        if number == 1:
            return  # what was trained is what answers
        trained, share = context.branches.read(), self.options.share(number)
        blend = context.branches.past[-1].B
        B = {layer: blend[layer].to(last) + share * (last - blend[layer].to(last)) for layer, last in trained.B.items()}
        context.answer_as(Factors(trained.A, B, trained.alpha), "all")
