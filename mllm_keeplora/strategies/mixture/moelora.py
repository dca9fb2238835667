"""MoELoRA: one branch divided into experts that a router in every layer mixes token by token; all is trained on.

Nothing is kept apart: experts and routers go on from domain to domain, in the hope that tokens of different domains
find experts of their own. With r = rank of all experts together, each of r / E coordinates,

    y = W x + alpha / r * sum_e softmax(R x)_e B_e A_e x.

Source: CoIN (arXiv 2403.08350) and its code as MCITlib runs it (`CoINMOELoraLinear`); dense, no balancing loss. The
weights sum to one, so experts that are mixed evenly have 1 / E of plain LoRA's scale; E times the alpha makes up for
it. Here A begins as in plain LoRA (published: normal, deviation 0.01), and a router sees its layer's input with LoRA
dropout applied, as A does (published: without).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from mllm_keeplora.adapters.mixers import rebuilt
from mllm_keeplora.strategies.base import Branch, Context, Need, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch


class MoELoRAOptions(StrategyOptions):
    """`rank` is that of all experts together; 8 experts as in CoIN, as many as domains in MCITlib (the presets).

    `clmoe-mcitlib` (MLLM-DCL; `-ucit`, `-acl`: those benchmarks) is what the rows "CL-MoE" of MCITlib's tables are: its
    v1 to v3 train and answer CL-MoE (CVPR 2025, arXiv 2503.00413) as this mixture with larger experts, without the
    momentum between domains and the router of domains. It trains the projector in full as well.
    """

    experts: int = Field(8, ge=1, validate_default=True)

    @field_validator("experts")
    @classmethod
    def _divides_the_rank(cls, value: int, info: ValidationInfo) -> int:
        rank = info.data.get("rank", value)
        if rank % value:
            raise ValueError(f"must divide strategy.rank {rank}, which all experts share")
        return value


class MoELoRA(Strategy):
    """Stores the branch and a router (experts, d_in) for every target layer."""

    Options: ClassVar[type[StrategyOptions]] = MoELoRAOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mllm_dcl": {"rank": 35, "alpha": 70.0, "experts": 5},
        "ucit": {"rank": 18, "alpha": 36.0, "experts": 6},
        "clmoe-mcitlib": {"rank": 160, "alpha": 320.0, "experts": 5},
        "clmoe-mcitlib-ucit": {"rank": 96, "alpha": 192.0, "experts": 6},
        "clmoe-mcitlib-acl": {"rank": 128, "alpha": 256.0, "experts": 4},
    }
    combine: ClassVar[Literal["gate"]] = "gate"
    # Routers run inside of other layers, for which ZeRO-3 would have to fetch their weights in between.
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: MoELoRAOptions

    def before_domain(self, context: Context) -> Branch:
        from torch.nn.init import uniform_

        from mllm_keeplora.adapters.mixers.experts import Experts

        branch, last = carried_branch(context, self.options), context.branches.past_mixer
        if last is not None:
            return replace(branch, mixer=rebuilt(*last.stored()))
        inputs = {layer: A.shape[1] for layer, A in branch.A.items()}
        mixer = Experts(self.options.experts, inputs)
        for layer, d_in in inputs.items():  # routers begin as linear layers do
            bound = 1 / math.sqrt(d_in)
            uniform_(mixer.router(layer).weight, -bound, bound, generator=context.rng)
        return replace(branch, mixer=mixer)
