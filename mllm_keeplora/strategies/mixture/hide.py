"""HiDe-LLaVA: a branch for each domain, from the base; summed in all blocks but the last, weighed by likeness there.

What domains learn is alike in all blocks but the last, so they are fused there. With c(q), e(q) the mean features of a
question's pictures and words and m_t those of domain t, and P the last `specific_blocks` blocks of the language model

    y = W x + sum_t g_t s B_t A_t x in P,   y = W x + s (sum_t B_t A_t) x elsewhere (`fusion: products`)
    g_t = softmax_t( (cos(c, m_t) + cos(e, m_t)) / 2 / temperature ).

Source: HiDe-LLaVA (ACL 2025, arXiv 2503.12941) and its code (Ghy0501/HiDe-LLaVA `4dd0793`, MCITlib `2956dfd`):
temperature 0.1, both modalities alike; preset `official` is its run on UCIT. Whether the paper writes products or sums
was not found. The released code, and with it the published rows, sums A and B apart, (sum_t B_t)(sum_t A_t), which adds
T^2 - T cross products that nothing was trained for; it couples branches, and mixers have no place for that. `top1` in
the last block is LAMDA-CL/Prism's reading.
Departures: those of `disco`. The projector's branches, published ones being trained in full, are fused. Nothing
abstains in the fused blocks, whose sum grows with the domains: expect little of it on bases of few blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.strategies.base import Context, StrategyOptions
from mllm_keeplora.strategies.mixture.disco import DISCO, DISCOOptions


class HiDeOptions(DISCOOptions):
    temperature: float = Field(0.1, gt=0.0)
    modality: Literal["text", "picture", "both"] = Field("both", description="whose cosines count")
    fusion: Literal["products"] = "products"
    last: Literal["soft", "top1"] = Field(
        "soft", description="in the last blocks: all domains, or the most alike alone"
    )
    specific_blocks: int = Field(1, ge=1, description="how many last blocks are weighed; more than there are means all")


class HiDe(DISCO):
    """Stores a branch a domain, and the mean features of its questions (float64)."""

    Options: ClassVar[type[StrategyOptions]] = HiDeOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {**DISCO.presets, "official": {"rank": 8, "alpha": 16.0}}
    options: HiDeOptions

    def _weighed(self, context: Context) -> dict[str, Any]:
        depths = {layer: context.layers.depth(layer) for layer in context.layers.names}
        first = max(depth for depth in depths.values() if depth is not None) + 1 - self.options.specific_blocks
        layers = [layer for layer, depth in depths.items() if depth is not None and depth >= first]
        return {"layers": layers, "top1": self.options.last == "top1"}
