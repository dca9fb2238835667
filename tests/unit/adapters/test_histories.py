"""What was learnt before, merged or as factors: the two histories agree, and every way back is exact."""

import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.adapters.history import split_at_break_even
from tests.unit.adapters.conftest import (
    ABSENT,
    HISTORIES,
    adapt,
    branch_of,
    projector_parameters,
    random_branch,
    random_factors,
    random_shift,
    same,
)
from tests.unit.conftest import logits_of, snapshot

# -- histories -------------------------------------------------------------------------------------------------------


def test_merged_history_and_factors_history_and_adapted_forward_agree(new_base, batch):
    first, second = random_factors(new_base(), 1), random_factors(new_base(), 2, without=(ABSENT,))
    logits = {}
    for history in HISTORIES:
        base = new_base()
        adapters = adapt(base, history)
        start = logits_of(adapters.model, batch)
        adapters.restore([first], [])
        adapters.open(branch_of(second))
        adapters.load(second, {})
        logits[history, "adapted"] = logits_of(adapters.model, batch)
        adapters.restore([first, second], [])
        logits[history, "restored"] = logits_of(adapters.model, batch)
    reference = logits["merged", "restored"]
    assert (reference - start).abs().max() > 0.1
    assert len(logits) == 4
    for found in logits.values():
        assert (found - reference).abs().max() < 1e-5 * reference.abs().max()


def test_merged_weight_is_the_pristine_one_plus_all_deltas(base, pristine):
    past = [random_factors(base, 1), random_factors(base, 2, without=(ABSENT,)), random_factors(base, 3)]
    adapters = adapt(base, "merged")
    adapters.restore(past, [])
    changed = {name for name, tensor in snapshot(base.model).items() if not torch.equal(tensor, pristine[name])}
    assert changed == {f"{layer}.weight" for layer in base.parts.target_layers}
    for layer in base.parts.target_layers:
        expected = pristine[f"{layer}.weight"].double()
        for factors in past:
            if layer in factors.A:
                scale = factors.alpha[layer] / factors.A[layer].shape[0]
                expected = expected + scale * factors.B[layer].double() @ factors.A[layer].double()
        assert torch.allclose(adapters.weight(layer).double(), expected, atol=1e-6)


@pytest.mark.parametrize("history", HISTORIES)
def test_restoring_twice_is_the_same_bit_for_bit(base, batch, history):
    past = [random_factors(base, 1), random_factors(base, 2)]
    adapters = adapt(base, history)
    adapters.restore(past, [])
    state, logits = snapshot(adapters.model), logits_of(adapters.model, batch)
    adapters.restore(past, [])
    assert same(snapshot(adapters.model), state)
    assert torch.equal(logits_of(adapters.model, batch), logits)
    adapters.restore(past[:1], [])
    adapters.open(random_branch(base, 3))
    adapters.restore(past, [])
    assert same(snapshot(adapters.model), state)


@pytest.mark.parametrize("history", HISTORIES)
def test_restoring_no_past_gives_back_the_pristine_weights_bit_for_bit(new_base, pristine, history):
    base = new_base("full")
    first, second = random_shift(base, 1), random_shift(base, 2)
    adapters = adapt(base, history, projector_parameters(base))
    adapters.restore([random_factors(base, 1)], [first])
    adapters.open(random_branch(base, 2))
    adapters.load(random_factors(new_base("full"), 2), second)
    adapters.restore([], [])
    assert adapters.model is base.model and adapters.branch is None
    assert same(snapshot(base.model), pristine)


@pytest.mark.parametrize(("dtype", "chosen"), [("float32", "merged"), ("bfloat16", "factors")])
def test_automatic_history_merges_only_where_weights_are_float32(new_base, dtype, chosen):
    base = new_base(dtype=dtype)
    assert adapt(base, "auto").mode == chosen


def test_factors_history_keeps_tiny_updates_that_a_merge_in_bfloat16_loses(new_base):
    """Every entry of the update is below half a bfloat16 step of its weight; what it does to its own inputs is not."""
    layer = "model.language_model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    A = torch.full((1, 32), 32**-0.5)
    B = torch.full((48, 1), 1.5e-4 * 32**0.5)
    features = (torch.linspace(0.5, 2.0, 256)[:, None] * A).to(torch.bfloat16)
    exact = features.double() @ (B @ A).double().mT
    kept = {}
    for history in HISTORIES:
        base = new_base(dtype="bfloat16")
        weight = base.model.get_submodule(layer).weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator).sign())
        adapters = adapt(base, history)
        with torch.no_grad():
            before = base.model.get_submodule(layer)(features).double()
            adapters.restore([Factors({layer: A}, {layer: B}, {layer: 1.0})], [])
            change = base.model.get_submodule(layer)(features).double() - before
        kept[history] = float((change * exact).sum() / exact.square().sum())
    assert kept["factors"] == pytest.approx(1.0, abs=0.1)
    assert kept["merged"] == 0.0


def test_many_tiny_updates_are_summed_before_they_are_cast(new_base):
    """Twenty domains in a row must not each be rounded away: the sum is made in float32 and cast once."""
    layer = "model.language_model.layers.0.mlp.up_proj"
    base = new_base(dtype="bfloat16")
    weight = base.model.get_submodule(layer).weight.detach().clone()
    A, B = torch.ones(1, 32), 1e-3 * weight.float().abs().mean() * torch.ones(48, 1)
    past = [Factors({layer: A}, {layer: B}, {layer: 1.0})] * 20
    adapters = adapt(base, "merged")
    adapters.restore(past, [])
    expected = (weight.double() + 20 * (B @ A).double()).to(torch.bfloat16)
    unequal = adapters.weight(layer) != expected
    assert float(unequal.float().mean()) < 0.01, "but for ties that float32 rounds the other way"
    assert not torch.equal(expected, weight)


@pytest.mark.parametrize("history", HISTORIES)
def test_weight_is_the_current_one_whatever_the_history(base, pristine, history):
    factors = random_factors(base, 1)
    adapters = adapt(base, history)
    adapters.restore([factors], [])
    adapters.open(random_branch(base, 2))
    for layer in base.parts.target_layers:
        expected = pristine[f"{layer}.weight"] + factors.delta(layer)
        assert torch.allclose(adapters.weight(layer), expected, atol=1e-6)


# -- parameters trained in full --------------------------------------------------------------------------------------


def test_full_deltas_of_the_projector_round_trip(new_base, batch, pristine):
    base = new_base("full")
    full = projector_parameters(base)
    assert len(full) == 4 and base.parts.projector_layers == ()
    shifts = [random_shift(base, 1), random_shift(base, 2)]
    adapters = adapt(base, "merged", full)
    adapters.restore([random_factors(base, 1)], shifts[:1])
    adapters.open(random_branch(base, 2))
    adapters.assert_plan()
    assert {name.removeprefix("base_model.model.") for name in adapters.trainable() if "lora" not in name} == set(full)
    assert all(not delta.any() for delta in adapters.read_full().values())

    for name in full:
        base.model.get_parameter(name).data.add_(shifts[1][name])
    read = adapters.read_full()
    assert read.keys() == set(full)
    for name in full:
        assert read[name].dtype == torch.float32 and torch.allclose(read[name], shifts[1][name], atol=1e-6)

    trained, logits = snapshot(base.model), logits_of(adapters.model, batch)
    adapters.restore([random_factors(base, 1)], [shifts[0], read])
    for name in full:
        assert torch.allclose(base.model.get_parameter(name), trained[name], atol=1e-6)
    assert torch.allclose(logits_of(adapters.model, batch), logits, atol=1e-5)  # B of the open branch was zero

    adapters.restore([random_factors(base, 1)], shifts[:1])
    adapters.open(random_branch(base, 2))
    adapters.load(random_factors(base, 2), read)
    for name in full:
        assert torch.allclose(base.model.get_parameter(name), trained[name], atol=1e-6)


# -- a long past -----------------------------------------------------------------------------------------------------


def test_a_long_past_runs_as_dense_deltas_and_answers_as_the_merged_one(new_base, batch):
    logits = {}
    for history in HISTORIES:
        base = new_base()
        adapters = adapt(base, history)
        adapters.restore([random_factors(base, seed, size=0.05) for seed in range(30)], [])
        assert adapters.peft is None, "with ranks this high no layer is worth its factors"
        adapters.open(random_branch(base, 99))
        logits[history] = logits_of(adapters.model, batch)
        adapters.restore([], [])
        logits[history, "untouched"] = logits_of(adapters.model, batch)
    assert (logits["factors"] - logits["factors", "untouched"]).abs().max() > 0.1
    assert (logits["merged"] - logits["factors"]).abs().max() < 1e-5 * logits["merged"].abs().max()
    assert torch.equal(logits["factors", "untouched"], logits["merged", "untouched"])


def test_a_past_turns_dense_layer_by_layer_just_past_break_even(new_base):
    base = new_base()
    layer = base.parts.target_layers[0]
    module = base.model.get_submodule(layer)
    d_in, d_out = module.in_features, module.out_features
    most = d_in * d_out // (d_in + d_out)

    def past_of_rank(rank):
        return Factors({layer: torch.ones(rank, d_in)}, {layer: torch.ones(d_out, rank)}, {layer: 2.0 * rank})

    factors, dense = split_at_break_even(past_of_rank(most))
    assert list(factors.A) == [layer] and not dense
    factors, dense = split_at_break_even(past_of_rank(most + 1))
    assert not factors.A and not factors.alpha
    assert torch.equal(dense[layer], torch.full((d_out, d_in), 2.0 * (most + 1)))
