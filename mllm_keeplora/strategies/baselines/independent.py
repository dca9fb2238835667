"""A branch for each domain, trained from the base and asked for its own domain only: no interference, no transfer.

An upper bound of what a domain's branch can learn: which domain a question belongs to is told (oracle). Unseen domains
and suites are answered by the base. Forgetting is zero by construction.
Source: the baseline PerTaskFT of O-LoRA (arXiv 2310.14152).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mllm_keeplora.strategies.base import Branch, Context, Strategy
from mllm_keeplora.strategies.baselines.plain import fresh_branch


class Independent(Strategy):
    """Stores one branch a domain."""

    start_from: ClassVar[Literal["base"]] = "base"
    combine: ClassVar[Literal["oracle"]] = "oracle"
    needs_domain_id: ClassVar[bool] = True

    def before_domain(self, context: Context) -> Branch:
        return fresh_branch(context, self.options)
