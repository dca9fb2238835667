"""A method of one's own, in a package of one's own: sequential LoRA that is pulled back to where a domain found it.

The pair A, B of the domain before is trained on under an added loss pull / 2 |theta - theta_start|^2, where theta_start
is what theta was when the domain began (L2-SP: Li, Grandvalet and Davoine, ICML 2018, arXiv 1802.01483).
"""

from __future__ import annotations

from pydantic import Field

from mllm_keeplora.strategies import Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch


class PulledOptions(StrategyOptions):
    pull: float = Field(0.1, ge=0.0)


class Pulled(Strategy):
    """Train one branch on from domain to domain, pulled back to the start of each."""

    Options = PulledOptions

    @property
    def needs(self):
        return frozenset({"parameters"})  # whole ones: a run under ZeRO-3, which divides them, is refused

    def before_domain(self, context):
        return carried_branch(context, self.options)

    def extra_loss(self, context, batch, outputs, step):
        theta = context.branches.trainable()
        if not self.start:  # the first step of this domain
            self.start = {name: values.detach().clone() for name, values in theta.items()}
        self.start = {name: self.start[name].to(values.device) for name, values in theta.items()}
        moved = sum((values - self.start[name]).square().sum() for name, values in theta.items())
        return self.options.pull / 2 * moved

    def training_state(self):  # in every checkpoint: a run killed within a training goes on as if it had not been
        return self.start

    def load_training_state(self, state):
        self.start = state


STRATEGIES = {"pulled": Pulled}
