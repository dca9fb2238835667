"""GainLoRA on a tiny model: what two trained domains leave of each other, and what is remembered of them.

Letters in brackets are those of the method's list of tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.adapters.mixers.gates import GATE_LAYERS, Gates, constrained
from mllm_keeplora.adapters.mixers.mixing import look_at
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import Basis
from mllm_keeplora.strategies.base import Strategy
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.mixture.gainlora import GainLoRA
from mllm_keeplora.strategies.mixture.gainlora_options import BASES, GainLoRAOptions
from tests.oracles import gainlora as oracle
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.mixers.test_gates import matrices, moments_of, random_gate
from tests.unit.conftest import encode, logits_of, snapshot

VOCABULARY = {"Alpha": "what colour is the red green", "Beta": "square where yes no left right"}
OPTIONS = {
    "rank": 4, "alpha": 8.0, "base": "plain", "gate_width": 24, "gate_samples": 12, "gate_energy": 1.0,
    "gate_energy_measure": "sigma2",
}  # fmt: skip


class Plain(Strategy):
    """A base method without any rule, which tells what it was asked."""

    def __init__(self, options):
        super().__init__(options)
        self.asked = []

    def prepare(self, context):
        self.asked.append("prepare")

    def before_domain(self, context):
        self.asked.append("before_domain")
        return fresh_branch(context, self.options)

    def batch(self, context, batch, step):
        self.asked.append("batch")
        return batch

    def extra_loss(self, context, batch, outputs, step):
        self.asked.append("extra_loss")
        return 0.0

    def around_step(self, context, phase, step):
        self.asked.append(phase)

    def after_domain(self, context):
        self.asked.append("after_domain")

    def state_dict(self):
        return {"asked": torch.tensor(len(self.asked))}

    def load_state_dict(self, state):
        self.asked = [None] * int(state.get("asked", 0))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(BASES, "plain", Plain)


@pytest.fixture(scope="module")
def questions(tiny_records) -> dict[str, list]:
    """The tiny domains, each asking by words of its own; with pictures and one answer each."""
    found = {}
    for number, name in enumerate(VOCABULARY):
        rng, words = np.random.default_rng(number), VOCABULARY[name].split()
        texts = [" ".join(rng.choice(words, 2 + place % 4)) + " ?" for place in range(12)]
        found[name] = [
            replace(record, turns=(Turn("user", text), record.turns[1]))
            for record, text in zip(tiny_records[name], texts, strict=True)
        ]
    return found


def gainlora(**options) -> GainLoRA:
    return GainLoRA(GainLoRAOptions(**{**OPTIONS, **options}))


def weights_for(base, gates, records) -> torch.Tensor:
    """Weights (n, parts) that a mixer finds for records, run one by one."""
    gates.family = base.family  # as `Mixing` gives it to a mixer that runs
    with torch.no_grad():
        return torch.cat([gates.weigh(encode(base, [record]), base.model) for record in records])


# -- two domains -----------------------------------------------------------------------------------------------------


@dataclass
class Taught:
    """Two domains learnt, the second branch still open."""

    base: object
    adapters: Adapters
    strategy: GainLoRA
    contexts: list
    first: dict  # memories after the first domain
    early: Gates  # after it
    opened: Gates  # as the second domain began
    changed: set
    declared: set
    facts: dict


def teach(base, questions, folder, args=None, lr=3e-2, **options) -> Taught:
    adapters, kept, strategy = Adapters(base, "merged", 0.0), {}, gainlora(**options)
    contexts = [context_of(base, adapters, questions, index, kept) for index in (-1, 0, 1)]
    strategy.prepare(contexts[0])
    learn(strategy, contexts[1], folder / "0", lr=lr, args=args)
    first, early = {layer: memory.columns for layer, memory in strategy.memories.items()}, adapters.past_mixer
    open_branch(strategy, contexts[2])
    opened, before = adapters.mixer.grown(), snapshot(adapters.model)
    declared = set(adapters.trainable())
    fit(strategy, contexts[2], folder / "1", lr=lr, args=args)
    changed = {name for name, value in snapshot(adapters.model).items() if not torch.equal(value, before[name])}
    opened.gates = opened.gates[:-1]
    strategy.after_domain(contexts[2])
    return Taught(
        base, adapters, strategy, contexts, first, early, opened, changed, declared, dict(contexts[2].facts)
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(new_base, questions, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASES, "plain", Plain)
        return teach(new_base(), questions, tmp_path_factory.mktemp("gainlora"))


def test_a_trained_gate_stays_silent_on_past_questions_and_hears_its_own(taught, questions):
    """(b, c)"""
    for gates in (taught.opened, taught.adapters.mixer):
        past, own = (weights_for(taught.base, gates, questions[name])[:, 1] for name in ("Alpha", "Beta"))
        assert past.max() < 1e-4 and own.mean() > 0.1


def test_training_moves_no_layer_of_a_gate_inside_the_memory_of_its_inputs(taught):
    """(c)"""
    for layer in GATE_LAYERS:
        start, end = (getattr(gates.newest, layer).detach() for gates in (taught.opened, taught.adapters.mixer))
        memory = taught.first[layer]
        assert 0 < memory.shape[1] < memory.shape[0]
        assert (end - start).norm() > 1e-2, "training must do something"
        assert ((end - start) @ memory).abs().max() < 1e-5


def test_without_the_constraint_a_gate_does_hear_past_questions(new_base, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_keeplora.adapters.mixers.gates.constrained", lambda values, **others: values)
    loose = teach(new_base(), questions, tmp_path)
    assert weights_for(loose.base, loose.adapters.mixer, questions["Alpha"])[:, 1].max() > 1e-2


def test_earlier_gates_and_branches_stay_as_they_are_bit_for_bit(taught):
    """(d)"""
    assert taught.changed == taught.declared
    gates = [name for name in taught.declared if "branch_mixer" in name]
    assert sorted(gates) == sorted(f"base_model.model.branch_mixer.gates.1.{layer}" for layer in GATE_LAYERS)
    assert len(taught.declared) == 3 + 2 * len(taught.adapters.layers)
    for layer in GATE_LAYERS:
        assert torch.equal(getattr(taught.adapters.mixer.gates[0], layer), getattr(taught.early.newest, layer))


def test_memories_are_those_of_the_reference(taught, questions):
    gate, base = taught.adapters.mixer.newest, taught.base
    for measure in ("sigma2", "sigma4"):
        strategy = gainlora(gate_energy=0.9, gate_energy_end=0.98, gate_energy_measure=measure)
        strategy.memories = {layer: Basis.from_columns(columns[:, :2]) for layer, columns in taught.first.items()}
        strategy.after_domain(taught.contexts[2])
        asked = np.stack([features_of(base, record) for record in questions["Beta"]])
        rows = [oracle.layer_inputs(row, *matrices(gate)[:2]) for row in asked]
        for place, layer in enumerate(GATE_LAYERS):
            inputs = np.stack([row[place] for row in rows])
            start, energy = taught.first[layer][:, :2].double().numpy(), oracle.threshold(0.9, 0.98, 1, 2)
            expected = oracle.remembered(start, inputs, energy, measure)
            found = strategy.memories[layer].columns.double().numpy()
            assert found.shape == expected.shape and found.shape[1] > 2
            assert np.abs(found @ found.T - expected @ expected.T).max() < 1e-3


def features_of(base, record) -> np.ndarray:
    """Mean embedding of the words before the answer, by hand."""
    batch, token = encode(base, [record]), base.model.config.image_token_id
    table = base.model.get_input_embeddings().weight.detach().double().numpy()
    ids = batch["input_ids"][0].tolist()
    start = next(place for place, label in enumerate(batch["labels"][0].tolist()) if label != -100)
    return np.mean([table[word] for word in ids[:start] if word != token], axis=0)


def test_memories_and_mean_weights_are_told(taught):
    told = taught.facts["gates"]
    assert told["remembered"] == {layer: memory.rank for layer, memory in taught.strategy.memories.items()}
    assert len(told["mean_weights"]) == 2 and told["mean_weights"][1] > 0.1


def test_a_layer_adds_every_branch_by_its_weight_for_the_question(new_base, questions, tmp_path):
    """Against the reference, with weights between none and all."""
    found = teach(new_base(), questions, tmp_path)
    adapters, batch = found.adapters, encode(found.base, questions["Beta"][:1])
    branches, seen = [*adapters.past, adapters.read()], {}
    for gate in adapters.mixer.gates:  # trained ones are all but closed on past questions: turn their keys a little
        gate.key.data.add_(adapters.mixer.newest.key.data.norm() / 30)
    weights = weights_for(found.base, adapters.mixer, questions["Beta"][:1])[0].tolist()
    assert all(0.02 < weight < 0.95 for weight in weights), weights
    modules = {layer: adapters.model.get_submodule(f"base_model.model.{layer}") for layer in adapters.layers}
    for layer, module in modules.items():
        module.register_forward_hook(lambda _, given, out, layer=layer: seen.update({layer: (given[0], out)}))
    adapters.look_at(batch)
    logits_of(adapters.model, batch)
    for layer, (x, y) in seen.items():
        module = modules[layer].base_layer
        parts = [(each.A[layer].numpy(), each.B[layer].numpy(), each.scaling(layer)) for each in branches]
        bias = 0.0 if module.bias is None else module.bias.detach().numpy()
        for row in (0, -1):
            given, out = (each.detach().flatten(0, -2)[row].numpy() for each in (x, y))
            wanted = oracle.gated_output(given, module.weight.detach().numpy(), parts, weights) + bias
            assert np.abs(out - wanted).max() < 1e-4, layer
    assert len(seen) == len(adapters.layers)


def opened_wide(self, batch, model):
    """In place of `Gates.weigh`: every branch takes part in full."""
    return torch.ones(len(batch["input_ids"]), len(self.gates))


def test_a_closed_new_gate_gives_the_model_before_the_domain(new_base, questions, tmp_path):
    """(e)"""
    second = teach(new_base(), questions, tmp_path)
    adapters, batch = second.adapters, encode(second.base, questions["Beta"][:3])
    last = adapters.read()
    past, gates, early = [*adapters.past], adapters.mixer, second.early
    closed = Gates(**gates.settings())
    closed.load_state_dict(gates.state_dict())
    closed.newest.key.data.zero_()
    found = {}
    for name, factors, mixer in (
        ("before", past, early),
        ("closed", [*past, last], closed),
        ("open", [*past, last], gates),
    ):
        adapters.restore(factors, [], mixer)
        adapters.look_at(batch)
        found[name] = logits_of(adapters.model, batch)
    assert torch.allclose(found["closed"], found["before"], atol=1e-5)
    assert not torch.allclose(found["open"], found["before"], atol=1e-3)


@pytest.mark.parametrize("name", ["gpm", "inflora", "olora"])
def test_gates_that_are_all_open_give_the_base_method(name, new_base, questions, tmp_path, monkeypatch):
    """(e) Trained by gradient descent, which does not enlarge what rounding makes different."""
    own = {"feature_samples": 12, "energy": 0.98} if name != "olora" else {"lambda1": 1e-3}
    monkeypatch.setattr(Gates, "weigh", opened_wide)
    learnt = []
    for strategy in (gainlora(base=name, base_options=own), BASES[name](BASES[name].Options(rank=4, alpha=8.0, **own))):
        base, kept = new_base(), {}
        adapters = Adapters(base, "merged", 0.0)
        strategy.prepare(context_of(base, adapters, questions, -1, kept))
        for index in range(2):
            context = context_of(base, adapters, questions, index, kept)
            learn(strategy, context, tmp_path / str(len(learnt)), lr=0.5, args={"optim": "sgd"})
        learnt.append((adapters.past, {layer: basis.rank for layer, basis in kept.items()}))
    (gated, ranks), (plain, wanted) = learnt
    assert ranks == wanted
    for one, other in zip(gated, plain, strict=True):
        for layer in other.A:
            assert (one.delta(layer) - other.delta(layer)).norm() < 1e-3 * other.delta(layer).norm(), layer


# -- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [False, True])
def test_padding_on_either_side_gives_the_same_weights(new_base, questions, pictures, tmp_path):
    """(f)"""
    base = new_base()
    adapters, strategy = Adapters(base, "merged", 0.0), gainlora(pictures=pictures)
    open_branch(strategy, context_of(base, adapters, questions, 0))
    records = [questions["Alpha"][place] for place in (0, 3)]
    singles = weights_for(base, adapters.mixer, records)
    batch = encode(base, records)
    mask = batch["attention_mask"].bool()
    assert not mask.all() and abs(float(singles[0] - singles[1])) > 1e-4
    for side in ("left", "right"):
        moved = {key: value.clone() for key, value in batch.items()}
        for row in range(2):
            for key, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
                real = batch[key][row][mask[row]]
                empty = real.new_full((mask.shape[1] - len(real),), fill)
                moved[key][row] = torch.cat([empty, real] if side == "left" else [real, empty])
        assert torch.allclose(adapters.mixer.weigh(moved, base.model), singles, atol=1e-6)


def test_what_is_answered_does_not_move_a_gate(taught, questions):
    """(g) Teacher-forced, asked alone, and step by step with a cache."""
    adapters, base = taught.adapters, taught.base
    for record in questions["Beta"][:3]:
        whole = encode(base, [record])
        start = int((whole["labels"][0] != -100).nonzero()[0])
        asked = {"input_ids": whole["input_ids"][:, :start], "attention_mask": whole["attention_mask"][:, :start]}
        asked["pixel_values"] = whole["pixel_values"]
        assert torch.equal(*(adapters.mixer.weigh(batch, base.model) for batch in (whole, asked)))
        look_at(base.model, whole)
        forced = logits_of(adapters.model, whole)[0, start - 1 :]
        look_at(base.model, asked)
        with torch.no_grad():
            found = adapters.model(**asked, use_cache=True)
            stepped = [found.logits[0, -1]]
            for place in range(start, whole["input_ids"].shape[1]):
                token = whole["input_ids"][:, place : place + 1]
                found = adapters.model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
                stepped.append(found.logits[0, -1])
        assert torch.allclose(torch.stack(stepped), forced, atol=1e-4)


def test_a_domain_that_asks_what_a_past_one_asked_is_refused_unless_pictures_tell_them_apart(
    new_base, tiny_records, tmp_path
):
    with pytest.raises(UserError, match=r"domain Beta: gates see nothing.*strategy\.pictures=true"):
        teach(new_base(), tiny_records, tmp_path / "words")
    seen = teach(new_base(), tiny_records, tmp_path / "pictures", pictures=True)
    past, own = (weights_for(seen.base, seen.adapters.mixer, tiny_records[name])[:, 1] for name in ("Alpha", "Beta"))
    assert past.max() < 1e-3 < 1e-1 < own.mean()


def test_gates_have_a_rate_of_their_own(new_base, questions, tmp_path):
    """At a vanishing one they stay as they were opened, and branches move."""
    found = teach(new_base(), questions, tmp_path, gate_rate=1e-9)
    for one, other in zip(found.adapters.mixer.newest.parameters(), found.opened.newest.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert all(B.abs().max() > 1e-3 for B in found.adapters.read().B.values())
    assert found.adapters.mixer.grown().rate == 1e-9


# -- the strategy ----------------------------------------------------------------------------------------------------


def test_every_hook_reaches_the_base_method(taught):
    steps = ["batch"] * 1 + ["extra_loss", "grad", "post"]
    domain = ["before_domain", *steps * 3, "after_domain"]
    assert taught.strategy.base.asked[: 1 + 2 * len(domain)] == ["prepare", *domain * 2]


def test_state_survives_a_restart_and_an_empty_one_forgets(taught):
    state = {name: tensor.clone() for name, tensor in taught.strategy.state_dict().items()}
    again = gainlora()
    again.load_state_dict(state)
    assert len(again.base.asked) == int(state["base|asked"]) > 0
    assert again.state_dict().keys() == state.keys() and len(state) == 4
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    again.load_state_dict({})
    assert not again.memories and not again.base.asked


def test_rows_are_as_long_after_the_projection_as_the_step_left_them(new_base, questions, tmp_path, monkeypatch):
    """Published: the change is that of the step alone, and rows are lengthened again. Against the reference."""
    seen = []

    def noted(values, before, memory, row_renorm):
        result = constrained(values, before, memory, row_renorm)
        seen.append([each.detach().clone() for each in (values, before, memory.columns, result)])
        return result

    monkeypatch.setattr("mllm_keeplora.adapters.mixers.gates.constrained", noted)
    parity = teach(new_base(), questions, tmp_path, row_renorm=True)
    assert len(seen) == 3 * len(GATE_LAYERS)
    for number, (values, before, memory, result) in enumerate(seen):
        expected = oracle.constrained(values.numpy(), before.numpy(), memory.numpy(), True)
        assert np.abs(result.numpy() - expected).max() < 1e-5
        if number >= len(GATE_LAYERS):
            assert torch.equal(before, seen[number - len(GATE_LAYERS)][3]), "the change is that of one step"
    assert torch.equal(seen[-1][3], parity.adapters.mixer.newest.key)


def test_a_published_key_is_as_long_as_uniform_numbers_and_points_where_it_did(new_base, questions):
    keys = []
    for length in ("row", "uniform"):
        base = new_base()
        context = context_of(base, Adapters(base, "merged", 0.0), questions, 0)
        open_branch(gainlora(key_length=length), context)
        keys.append(context.branches.mixer.newest.key.detach().flatten())
    row, uniform = keys
    assert torch.cosine_similarity(row, uniform, dim=0) == pytest.approx(1.0, abs=1e-6)
    assert row.norm() < 1.2 and uniform.norm() == pytest.approx((len(uniform) / 3) ** 0.5, rel=0.3)


def test_statistics_are_summed_over_processes(new_base, questions):
    base = new_base()
    adapters = Adapters(base, "merged", 0.0)

    def opened(shared):
        adapters.restore([], [])
        context = context_of(base, adapters, questions, 0)
        rows = context.passes.question_features(12, pictures=False)
        if shared:
            context.passes.question_features = lambda samples, pictures: rows[:5]
            gate = random_gate(context.rng.initial_seed() + 1, 32, OPTIONS["gate_width"])
            rest = moments_of(gate.inputs(rows[5:])["key"].detach())
            context.processes.reduce = lambda tensors: [a.add_(b) for a, b in zip(tensors, rest.tensors(), strict=True)]
        open_branch(gainlora(), context)
        return adapters.mixer.newest.key.detach().clone()

    assert torch.allclose(opened(True), opened(False), atol=1e-6)
