"""Joint training: all domains at once, an upper bound for Last; as many steps as the whole sequence has.

The branch is that of sequential LoRA. One pass over all records together in random order, each as often as its domain
has epochs (a fraction of an epoch by a seeded sample), so that domains count by their size. The sequence rounds up to
whole batches domain by domain, joint training once: it may have fewer steps by less than one a domain and epoch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.base import Branch, Context, Strategy
from mllm_keeplora.strategies.baselines.plain import fresh_branch


class Joint(Strategy):
    stream: ClassVar[Literal["union"]] = "union"
    joins_domains: ClassVar[bool] = True

    def before_domain(self, context: Context) -> Branch:
        return fresh_branch(context, self.options)
