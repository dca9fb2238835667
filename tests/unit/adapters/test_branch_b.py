"""A branch whose B starts away from zero: on disk, opened, trained, read back and continued."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.adapters import Branch, Factors
from tests.oracles import subspace as oracle
from tests.unit.adapters.conftest import ABSENT, HISTORIES, adapt, random_branch, random_factors, same
from tests.unit.conftest import logits_of, snapshot

QUICK = settings(max_examples=10, deadline=None)
TRAINS = [("B",), ("A", "B")]


def branch_with_b(base, seed, train=("B",), **options):
    """Random A, alpha and a B that is anything but small."""
    factors = random_factors(base, seed, **options)
    return Branch(factors.A, factors.alpha, train, factors.B)


def train_a_little(adapters, seed=0):
    """Move everything that trains; returns parameter name -> how it was and how it is."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, parameter in adapters.trainable().items():
        before = parameter.detach().clone()
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        moved[name] = before, parameter.detach().clone()
    return moved


def differ(one, other):
    return float((one - other).abs().max() / other.abs().max())


# -- on disk ---------------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from([("B",), ("A",), ("A", "B")]))
def test_a_branch_with_b_comes_back_from_disk_bit_for_bit_and_in_order(rank, seed, train):
    generator = torch.Generator().manual_seed(seed)
    layers = ("layers.10.q", "layers.1.q", "layers.1.q.B")
    A = {layer: torch.randn(rank, 5, generator=generator) for layer in layers}
    B = {layer: torch.randn(6, rank, generator=generator) for layer in layers}
    branch = Branch(A, dict.fromkeys(layers, 0.25), train, B)
    with tempfile.TemporaryDirectory() as folder:
        branch.save(Path(folder) / "init.safetensors")
        stored = Branch.load(Path(folder) / "init.safetensors")
    assert same(stored.A, A) and same(stored.B, B) and list(stored.A) == list(stored.B) == list(layers)
    assert stored.alpha == branch.alpha and stored.train == train and stored.ranks == branch.ranks


def test_a_branch_without_b_comes_back_without_b(tmp_path):
    Branch({"q": torch.ones(2, 5)}, {"q": 1.0}).save(tmp_path / "init.safetensors")
    assert Branch.load(tmp_path / "init.safetensors").B == {}


def test_b_is_given_for_every_layer_or_for_none():
    A, alpha = {"q": torch.zeros(1, 5), "k": torch.zeros(1, 5)}, {"q": 1.0, "k": 1.0}
    with pytest.raises(AssertionError):
        Branch(A, alpha, B={"q": torch.zeros(6, 1)})
    with pytest.raises(AssertionError):
        Branch(A, alpha, B=dict.fromkeys(("q", "k", "v"), torch.zeros(6, 1)))


# -- opened ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("learnt", [0, 2])
@pytest.mark.parametrize("train", TRAINS)
def test_opening_leaves_the_function_unchanged_although_b_is_not_zero(base, batch, history, learnt, train):
    """[10]"""
    adapters = adapt(base, history)
    adapters.restore([random_factors(base, seed) for seed in range(learnt)], [])
    before, branch = logits_of(adapters.model, batch), branch_with_b(base, 9, train)
    adapters.open(branch)
    assert differ(logits_of(adapters.model, batch), before) < 1e-5
    for layer, B in branch.B.items():
        running = adapters.trainable()[f"base_model.model.{layer}.lora_B.domain.weight"]
        assert torch.equal(running, B), "training must start at the B that was given"


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("train", TRAINS)
def test_exactly_the_stated_parts_train_and_what_takes_b_off_the_base_does_not(base, history, train):
    adapters = adapt(base, history)
    adapters.restore([random_factors(base, 1)], [])
    adapters.open(branch_with_b(base, 2, train))
    required = {name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad}
    parts = [f"lora_{part}.domain.weight" for part in train]
    assert required == {f"base_model.model.{layer}.{part}" for layer in base.parts.target_layers for part in parts}
    assert set(adapters.trainable()) == required
    adapters.assert_plan()


@pytest.mark.parametrize("history", HISTORIES)
def test_the_weight_of_a_layer_does_not_contain_the_open_branch(base, history):
    adapters = adapt(base, history)
    adapters.restore([random_factors(base, 1)], [])
    before = {layer: adapters.weight(layer).clone() for layer in adapters.layers}
    adapters.open(branch_with_b(base, 2))
    train_a_little(adapters)
    for layer, weight in before.items():
        assert torch.allclose(adapters.weight(layer), weight, atol=1e-6)


# -- read and merged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", TRAINS)
def test_a_branch_that_was_not_trained_has_taught_nothing(base, train):
    adapters = adapt(base)
    adapters.open(branch_with_b(base, 3, train))
    factors = adapters.read()
    assert all(factors.delta(layer).abs().max() < 1e-6 for layer in adapters.layers)


def test_what_is_read_is_how_far_b_has_moved(base):
    adapters, branch = adapt(base), branch_with_b(base, 4)
    adapters.open(branch)
    moved = train_a_little(adapters)
    factors = adapters.read()
    assert len(moved) == len(factors.B) == 16
    for layer, B in factors.B.items():
        before, after = moved[f"base_model.model.{layer}.lora_B.domain.weight"]
        assert torch.allclose(B, after - before, atol=1e-6) and B.abs().max() > 0.05
        assert torch.equal(factors.A[layer], branch.A[layer]) and factors.alpha[layer] == branch.alpha[layer]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("train", TRAINS)
def test_the_restored_model_computes_what_the_trained_one_did(base, batch, history, train):
    """[11]"""
    adapters, past = adapt(base, history), [random_factors(base, 1)]
    adapters.restore(past, [])
    before = logits_of(adapters.model, batch)
    adapters.open(branch_with_b(base, 5, train, without=(ABSENT,)))
    train_a_little(adapters)
    adapted = logits_of(adapters.model, batch)
    assert differ(adapted, before) > 1e-2
    adapters.restore([*past, adapters.read()], [])
    assert differ(logits_of(adapters.model, batch), adapted) < 1e-5


@pytest.mark.parametrize("train", TRAINS)
def test_stored_delta_plus_base_is_the_weight_that_ran(base, train):
    """[11], equation (7) with W' = W - s A B0"""
    pristine = snapshot(base.model)
    adapters, branch = adapt(base), branch_with_b(base, 6, train)
    adapters.open(branch)
    train_a_little(adapters)
    factors, running = adapters.read(), snapshot(base.model)
    for layer in adapters.layers:
        scale = branch.alpha[layer] / branch.A[layer].shape[0]
        taken = oracle.delta_weight(branch.A[layer].numpy(), branch.B[layer].numpy(), -scale)
        A, B = (running[f"{layer}.lora_{part}.domain.weight"].numpy() for part in "AB")
        ran = oracle.merge(pristine[f"{layer}.weight"].numpy() + taken, [(A, B, scale)])
        stored = pristine[f"{layer}.weight"].double().numpy() + factors.delta(layer).double().numpy()
        assert abs(stored - ran).max() < 1e-5


# -- continued -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", TRAINS)
def test_a_run_continued_from_what_was_read_is_where_it_was(new_base, batch, train):
    base = new_base()
    first, second, branch = adapt(base), adapt(new_base()), branch_with_b(base, 7, train)
    first.open(branch)
    train_a_little(first)
    factors = first.read()
    second.open(branch)
    second.load(factors, {})
    assert differ(logits_of(second.model, batch), logits_of(first.model, batch)) < 1e-5
    again = second.read()
    for layer in factors.A:
        assert torch.allclose(again.delta(layer), factors.delta(layer), atol=1e-6)
    second.assert_plan()


def test_factors_of_a_frozen_a_are_read_as_they_were_loaded(base):
    adapters, branch = adapt(base), branch_with_b(base, 8)
    adapters.open(branch)
    factors = Factors(branch.A, random_factors(base, 9).B, branch.alpha)
    adapters.load(factors, {})
    read = adapters.read()
    assert same(read.A, factors.A) and read.alpha == factors.alpha
    assert all(torch.allclose(read.B[layer], factors.B[layer], atol=1e-6) for layer in factors.B)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("train", TRAINS)
def test_the_closed_model_is_the_one_before_the_branch(base, batch, history, train):
    adapters = adapt(base, history)
    adapters.restore([random_factors(base, 1)], [])
    before = logits_of(adapters.model, batch)
    adapters.open(branch_with_b(base, 10, train))
    train_a_little(adapters)
    after, state, trained = logits_of(adapters.model, batch), snapshot(adapters.model), set(adapters.trainable())
    with adapters.closed():
        assert differ(logits_of(adapters.model, batch), before) < 1e-5
    assert torch.equal(logits_of(adapters.model, batch), after)
    assert same(snapshot(adapters.model), state) and set(adapters.trainable()) == trained
    adapters.assert_plan()


def test_a_plain_branch_may_follow_one_with_b(base, batch):
    """What took B off the base must be gone with its branch."""
    adapters = adapt(base)
    adapters.open(branch_with_b(base, 11))
    train_a_little(adapters)
    factors = adapters.read()
    adapters.restore([factors], [])
    before = logits_of(adapters.model, batch)
    adapters.open(random_branch(base, 12))
    assert torch.equal(logits_of(adapters.model, batch), before)
    assert all(not B.any() for B in adapters.read().B.values())
