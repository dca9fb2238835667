"""Strategies whose branches answer other than they were trained, as a plugin: processes of their own load it, too."""

from __future__ import annotations

from mllm_keeplora.adapters import Factors, concatenate
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.strategies.base import Branch
from mllm_keeplora.strategies.baselines.plain import carried_branch, fresh_branch


def scaled(factors: Factors, share: float) -> Factors:
    return Factors(factors.A, {layer: share * B for layer, B in factors.B.items()}, factors.alpha)


class Halved(Strategy):
    """Each branch answers half as loud as it was trained, beside the earlier ones."""

    def before_domain(self, context):
        return fresh_branch(context, self.options)

    def after_domain(self, context):
        context.answer_as(scaled(context.branches.read(), 0.5))


class Averaged(Strategy):
    """Branches begin at the base, and one answers: the mean of all, of parameters trained in full, too."""

    start_from = "base"
    recalls = "all"

    def before_domain(self, context):
        return fresh_branch(context, self.options)

    def after_domain(self, context):
        trained = [context.trained(index) for index in range(context.domain.index + 1)]
        share = 1 / len(trained)
        merged = concatenate([scaled(factors, share) for factors, _ in trained])
        full = {name: share * sum(deltas[name] for _, deltas in trained) for name in context.branches.full}
        context.answer_as(merged, "all", full if context.branches.full else None)


class Resumed(Strategy):
    """Trains on the last B as it was trained, and answers by the mean of all B."""

    recalls = "last"

    def load_state_dict(self, state):
        self.B = state

    def state_dict(self):
        return self.B

    def before_domain(self, context):
        if context.domain.index == 0:
            return carried_branch(context, self.options)
        last, _ = context.trained(context.domain.index - 1)
        return Branch(last.A, last.alpha, ("A", "B"), last.B, carried=True)

    def after_domain(self, context):
        trained, count = context.branches.read(), context.domain.index + 1
        self.B = {layer: self.B.get(layer, B) + (B - self.B.get(layer, B)) / count for layer, B in trained.B.items()}
        context.answer_as(Factors(trained.A, self.B, trained.alpha), "all")


class Folded(Halved):
    """One branch answers, half of the sum of the one before and the new one, which begins at the model before."""

    def after_domain(self, context):
        context.answer_as(scaled(concatenate([*context.branches.past, context.branches.read()]), 0.5), "all")


STRATEGIES = {"folded": Folded, "halved": Halved, "averaged": Averaged, "resumed": Resumed}
