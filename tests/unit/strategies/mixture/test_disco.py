"""DISCO and what HiDe shares with it: means of questions that come domain by domain, and a mixer of those alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.strategies.mixture.disco import DISCO, DISCOOptions
from mllm_keeplora.strategies.mixture.hide import HiDe, HiDeOptions
from tests.oracles import similarity as oracle
from tests.support.strategies import context_of, learn, open_branch
from tests.unit.conftest import encode

LEARNT = {"disco": (DISCO, DISCOOptions), "hide": (HiDe, HiDeOptions)}
SLOTS = {"mllm_dcl": (160, 5), "mllm_acl": (128, 4), "ucit": (96, 6)}  # R of all T slots, as MCITlib's runs have it


@pytest.fixture(params=LEARNT)
def strategy(request):
    kind, options = LEARNT[request.param]
    return kind(options(rank=3, alpha=6.0, modality="both"))


def test_the_mixer_has_the_mean_of_every_domains_questions(strategy, base, tiny_records, tmp_path):
    adapters, wanted = Adapters(base, "merged", 0.0), []
    for index, name in enumerate(tiny_records):
        adapters.restore([], [])
        context = context_of(base, adapters, tiny_records, index)
        learn(strategy, context, tmp_path / name, epochs=0.4)
        wanted.append(oracle.mean(base.family.question_features(base.model, encode(base, tiny_records[name])).numpy()))
        assert np.allclose(strategy.state_dict()["means"].numpy(), wanted, rtol=1e-5, atol=1e-7)
        mixer = context.answering
        assert torch.equal(mixer.means, strategy.state_dict()["means"].float())
        assert mixer.temperature == strategy.options.temperature and mixer.modality == "both" and mixer.centered
        words = base.family.feature_sizes(base.model)[0]
        anchors = [(row[:words], row[words:]) for row in wanted]
        rows = base.family.question_features(base.model, encode(base, tiny_records[name])).numpy()
        told = [oracle.weights((r[:words], r[words:]), anchors, "both", mixer.temperature, centered=True) for r in rows]
        assert context.facts["likeness"]["mean_weights"] == pytest.approx(np.mean(told, axis=0).tolist(), abs=1e-4)
    assert len(wanted) == 2


def test_a_domain_to_come_has_no_part_and_leaves_no_trace(strategy, base, tiny_records, tmp_path):
    """Whatever comes after the first domain, its mixer is the same, and names none."""
    stored = []
    for names in (["Alpha"], ["Alpha", "Beta"]):
        adapters, learner = Adapters(base, "merged", 0.0), type(strategy)(strategy.options)
        context = context_of(base, adapters, {name: tiny_records[name] for name in names}, 0)
        learn(learner, context, tmp_path / "-".join(names), epochs=0.4)
        stored.append(context.answering.stored())
        adapters.look_at(encode(base, tiny_records["Beta"][:4]))
        assert torch.equal(adapters.mixer.weights, torch.ones(4, 1)), "nothing is left for domains to come"
    (facts, tensors), (others, later) = stored
    assert facts == others and tensors.keys() == later.keys() and all(torch.equal(tensors[n], later[n]) for n in later)
    assert "Alpha" not in str(facts) and "Beta" not in str(facts)


def test_a_run_that_goes_on_from_its_files_ends_with_the_same_means(strategy, base, tiny_records, tmp_path):
    adapters = Adapters(base, "merged", 0.0)
    context = context_of(base, adapters, tiny_records, 0)
    learn(strategy, context, tmp_path, epochs=0.4)
    state = {name: tensor.clone() for name, tensor in strategy.state_dict().items()}
    assert state["means"].shape[0] == 1 and state["means"].dtype == torch.float64
    other = type(strategy)(strategy.options)
    other.load_state_dict(state)
    adapters.restore([], [])
    context = context_of(base, adapters, tiny_records, 1)
    open_branch(other, context)
    other.after_domain(context)
    assert torch.equal(other.state_dict()["means"][:1], state["means"]) and len(other.state_dict()["means"]) == 2
    other.load_state_dict({})
    assert other.state_dict() == {}


def test_words_alone_are_looked_at_where_no_picture_counts(base, tiny_records, tmp_path):
    context = context_of(base, Adapters(base, "merged", 0.0), tiny_records, 0)
    learn(DISCO(DISCOOptions(rank=3, samples=4)), context, tmp_path, epochs=0.4)
    assert context.answering.means.shape == (1, base.family.feature_sizes(base.model)[0])


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("preset", SLOTS)
def test_a_preset_trains_as_many_numbers_a_domain_as_a_published_slot(name, preset, base, tiny_records):
    """A slot of R / T at a scale of 2."""
    kind, options = LEARNT[name]
    rank, slots = SLOTS[preset]
    chosen = options(**kind.presets[preset])
    assert chosen.alpha / chosen.rank == 2
    context = context_of(base, Adapters(base, "merged", 0.0), tiny_records, 0)
    open_branch(kind(chosen), context)
    modules = map(base.model.get_submodule, base.parts.target_layers)
    sizes = sum(sum(module.weight.shape) for module in modules)
    assert sum(p.numel() for p in context.branches.trainable().values()) * slots == rank * sizes


# -- what released code makes of the means -----------------------------------------------------------------------------


def drifting(steps=5000, change=500, width=64):
    """Batches of four questions around one mean, and from a step on around another."""
    rng = np.random.default_rng(0)
    first, later = rng.standard_normal((2, width))
    return [(first if step < change else later) + rng.standard_normal((4, width)) for step in range(steps)]


def cosine(x, y):
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_a_running_mean_in_half_precision_stalls_and_this_one_does_not():
    batches = drifting()
    rows = np.concatenate(batches)
    exact = oracle.mean(rows)
    assert np.allclose(torch.tensor(rows).float().double().mean(dim=0).numpy(), exact, atol=1e-6)
    anchor, count = oracle.stalled_mean(batches)
    assert count == 1024, "it counts no further, by fours"
    assert cosine(anchor, exact) < 0.98
    early = oracle.stalled_mean(batches[:200])[0]
    assert cosine(early, oracle.mean(np.concatenate(batches[:200]))) > 0.99, "before that it is a mean"


def test_a_sum_in_half_precision_is_no_mean_either():
    batches = drifting(change=0)
    anchor, total = oracle.stalled_sum(batches), np.concatenate(batches).sum(axis=0)
    assert np.linalg.norm(anchor) < 0.5 * np.linalg.norm(total) and cosine(anchor, total) < 0.98
