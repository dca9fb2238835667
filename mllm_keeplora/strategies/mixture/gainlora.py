"""GainLoRA: gates decide from the question which branches take part; a new gate is silent on past domains' questions.

Branches come about as the method in `base` has them, and stay live: y = W x + sum_i a_i(question) s B_i A_i x, with the
gate a_i of `adapters.gates`. M_l holds the inputs of gate layer l on past domains. A new gate is a copy of the last but
for its key G_3, which is outside of M_3 and where the new domain's p_2 is strongest; after every step of the optimizer
the change of G_l is taken out of M_l. So a_t = 0 on past questions, and stays so: f(0) = 0. Afterwards M_l grows.
Source: GainLoRA (NeurIPS 2025, arXiv 2505.15424) and its code (liangyanshuo/gainlora, a47edf4: T5, over InfLoRA).
Departures from the code: p_0 is divided by the true number of words; rows are not made as long again (`row_renorm`),
and the change is counted from the domain's start, which is the same; the first domain reaches its share of energy, and
the share rises over the run's domains, not over 15; the features are not cut into blocks. Not published: `pictures`
adds the frozen tower's, as long as the words' (the projector may train, so it is never looked through); how long a
first key is (the code gives its direction, here too): as a row of a linear layer, and later ones as long as those
before; the published trainer has a key of uniform numbers in (-1, 1) at every domain (`key_length: uniform`). Rank and
alpha are not the code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.base import Branch, Context, Need, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.footprint import Footprint, PassSizes
from mllm_keeplora.strategies.mixture.gainlora_options import BASES, GainLoRAOptions, options_of_base

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.linalg import Basis, MomentAccumulator

OF_BASE, OF_MEMORY = "base|", "memory|"


class GainLoRA(Strategy):
    """Stores per domain: the branch, all gates so far, the memories of the gates' inputs, and what the base stores."""

    Options: ClassVar[type[StrategyOptions]] = GainLoRAOptions
    combine: ClassVar[Literal["gate"]] = "gate"
    options: GainLoRAOptions

    def __init__(self, options: GainLoRAOptions):
        super().__init__(options)
        self.base = BASES[options.base](options_of_base(options.model_dump(), options.base_options))
        self.memories: dict[str, Basis] = {}  # by gate layer; none before the first domain is over
        self._before: dict[str, Tensor] = {}

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"parameters"}) | self.base.needs

    @property
    def trains(self) -> tuple[str, ...]:
        return self.base.trains

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Give what its base method takes; gates are small."""
        return self.base.footprint(sizes)

    def prepare(self, context: Context) -> None:
        self.base.prepare(context)

    def before_domain(self, context: Context) -> Branch:
        """Begin the branch of the base method, with one gate more, whose key is turned to the domain.

        Raises:
            UserError: the gates have nothing to tell the domain's questions from past ones by.
        """
        import torch

        from mllm_keeplora.adapters.mixers.gates import Gates, informed_key
        from mllm_keeplora.linalg import Basis

        options, questions = self.options, self._questions(context)
        d = questions.shape[1]
        if context.branches.past:
            gates = context.branches.past_mixer.grown()
        else:
            words = context.passes.feature_sizes(pictures=False)[0]
            gates = Gates(1, d, options.gate_width, options.gate_head, words, options.gate_rate)
            apart = torch.Generator().manual_seed(context.rng.initial_seed() + 1)  # the base draws what it would alone
            gates.newest.begin(apart)
        with torch.no_grad():
            gate = gates.newest
            moments = _moments(context, gate.inputs(questions)["key"])
            key = informed_key(gate.key, self.memories.get("key", Basis(d)), moments)
            if key is None:
                raise UserError(
                    f"domain {context.domain.name}: gates see nothing in its questions that past ones do not have; "
                    "strategy.pictures=true shows them the pictures, and a lower strategy.gate_energy forgets more"
                )
            if options.key_length == "uniform":  # drawn apart, too
                fresh = torch.Generator().manual_seed(context.rng.initial_seed() + 2)
                key = key * (torch.rand(d, generator=fresh) * 2 - 1).norm() / key.norm()
            gate.key.copy_(key)
        return replace(self.base.before_domain(context), mixer=gates)

    def batch(self, context: Context, batch: dict[str, Any], step: Step) -> dict[str, Any]:
        if self.options.row_renorm and self.memories:
            trained = context.branches.trainable()
            self._before = {layer: trained[name].detach().clone() for layer, name in _newest(context).items()}
        return self.base.batch(context, batch, step)

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        return self.base.extra_loss(context, batch, outputs, step)

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        """Take the change of every layer of the new gate out of the memory of that layer's inputs."""
        from mllm_keeplora.adapters.mixers.gates import constrained

        self.base.around_step(context, phase, step)
        if phase != "post" or not self.memories:
            return
        for layer, name in _newest(context).items():
            if self.options.row_renorm:  # lengths change with every step: the change is counted from the step's start
                before = self._before[layer]
            else:
                # From the domain's start, which is known without keeping it: that of G_1 and G_2 is the gate before,
                # and what counts of the key's, its part inside the memory, is zero.
                before = getattr(context.branches.mixer.gates[-2], layer).detach()
                before = before.new_zeros(before.shape) if layer == "key" else before
            memory, row_renorm = self.memories[layer], self.options.row_renorm
            context.edit_parameter(name, partial(constrained, before=before, memory=memory, row_renorm=row_renorm))

    def after_domain(self, context: Context) -> None:
        """Let the base method finish, and remember what every layer of the new gate receives on the domain."""
        import torch

        from mllm_keeplora.linalg import Basis, moment_rows

        self.base.after_domain(context)
        options, gates = self.options, context.branches.mixer
        energy = options.gate_energy_at(context.domain.index, context.domain.total)
        with torch.no_grad():
            questions = self._questions(context).to(gates.newest.key.device)
            inputs = gates.newest.inputs(questions)
            weights = gates(questions).sum(dim=0)
        context.processes.reduce([weights])
        for layer, rows in inputs.items():
            moments = _moments(context, rows)
            source = moment_rows(moments) if options.gate_energy_measure == "sigma4" else moments
            self.memories.setdefault(layer, Basis(rows.shape[1])).grow(source, energy)
        ranks = {layer: memory.rank for layer, memory in self.memories.items()}
        context.log({"gates": {"remembered": ranks, "mean_weights": (weights / moments.count).tolist()}})

    def state_dict(self) -> dict[str, Tensor]:
        of_base = {OF_BASE + name: tensor for name, tensor in self.base.state_dict().items()}
        return {**of_base, **{OF_MEMORY + layer: memory.columns for layer, memory in self.memories.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        from mllm_keeplora.linalg import Basis

        self.base.load_state_dict(_part(state, OF_BASE))
        self.memories = {layer: Basis.from_columns(each) for layer, each in _part(state, OF_MEMORY).items()}

    def training_state(self) -> dict[str, Tensor]:
        return self.base.training_state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        self.base.load_training_state(state)

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _questions(self, context: Context) -> Tensor:
        """p_0 of the domain's questions, (n, d): this process's share."""
        from mllm_keeplora.adapters.mixers.gates import balanced

        features = context.passes.question_features(self.options.gate_samples, self.options.pictures)
        return balanced(features, context.passes.feature_sizes(pictures=False)[0])


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _newest(context: Context) -> dict[str, str]:
    """Names of the newest gate's parameters, by gate layer."""
    from mllm_keeplora.adapters.mixers.gates import GATE_LAYERS

    place = f".gates.{len(context.branches.mixer.gates) - 1}."
    names = context.branches.trainable()
    return {layer: next(name for name in names if name.endswith(place + layer)) for layer in GATE_LAYERS}


def _moments(context: Context, rows: Tensor) -> MomentAccumulator:
    """Moments of a gate layer's inputs (n, d), float64, over all processes."""
    import torch

    from mllm_keeplora.linalg import MomentAccumulator

    moments = MomentAccumulator(rows.shape[1], dtype=torch.float64)
    moments.update(rows.double())
    context.processes.reduce(moments.tensors())
    return moments
