"""Branches on a tiny model: opening changes nothing, the two histories agree, and every way back is exact."""

import pytest
import torch

from mllm_keeplora.adapters import Adapters, Branch, Factors
from mllm_keeplora.training.context import RunContext
from tests.unit.conftest import encode, logits_of, snapshot

HISTORIES = ("merged", "factors")
ABSENT = "model.language_model.layers.1.mlp.down_proj"  # the layer that has no room in some tests


def random_branch(base, seed, rank=3, without=(), train=("B",)):
    generator = torch.Generator().manual_seed(seed)
    A, alpha = {}, {}
    for number, layer in enumerate(base.parts.target_layers):
        if layer not in without:
            own = 1 + (rank + number) % rank  # ranks and scales differ from layer to layer
            A[layer] = torch.randn(own, base.model.get_submodule(layer).in_features, generator=generator) / 4
            alpha[layer] = 0.5 + number / 4
    return Branch(A, alpha, train)


def random_factors(base, seed, size=0.3, **options):
    branch = random_branch(base, seed, **options)
    generator = torch.Generator().manual_seed(seed + 1000)
    B = {
        layer: size * torch.randn(base.model.get_submodule(layer).out_features, A.shape[0], generator=generator)
        for layer, A in branch.A.items()
    }
    return Factors(branch.A, B, branch.alpha)


def branch_of(factors, train=("B",)):
    return Branch(factors.A, factors.alpha, train)


def adapt(base, history="merged", full=()):
    return Adapters(base.model, base.parts.target_layers, history, 0.0, full)


def projector_parameters(base):
    return tuple(name for name, _ in base.model.named_parameters() if name.startswith(base.parts.mm_projector))


def random_shift(base, seed):
    generator = torch.Generator().manual_seed(seed)
    names = projector_parameters(base)
    return {name: 0.1 * torch.randn(base.model.get_parameter(name).shape, generator=generator) for name in names}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def batch(base, tiny_records):
    return encode(base, tiny_records["Alpha"][:4])


@pytest.fixture
def pristine(base):
    return snapshot(base.model)


# -- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("learnt", [0, 2])
def test_opening_a_branch_leaves_the_logits_unchanged_exactly(base, batch, history, learnt):
    adapters = adapt(base, history)
    adapters.restore([random_factors(base, seed) for seed in range(learnt)], [])
    before = logits_of(adapters.model, batch)
    adapters.open(random_branch(base, 9))
    assert torch.equal(logits_of(adapters.model, batch), before)


@pytest.mark.parametrize("train", [("B",), ("A", "B")])
def test_exactly_the_stated_parts_of_the_open_branch_train(base, train):
    adapters = adapt(base, "factors")
    adapters.restore([random_factors(base, 1)], [])
    adapters.open(random_branch(base, 2, train=train))
    found = {name for name, parameter in adapters.model.named_parameters() if parameter.requires_grad}
    prefix, parts = "base_model.model.", [f"lora_{part}.domain.weight" for part in train]
    assert found == {f"{prefix}{layer}.{part}" for layer in base.parts.target_layers for part in parts}
    assert set(adapters.trainable()) == found
    adapters.assert_plan()


def test_nothing_trains_without_an_open_branch(base):
    adapters = adapt(base, "factors")
    adapters.restore([random_factors(base, 1)], [])
    assert adapters.trainable() == {}
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())


@pytest.mark.parametrize("stray", ["model.language_model.embed_tokens.weight", "lm_head.weight"])
def test_a_stray_trained_parameter_is_noticed_before_and_after_training(base, stray):
    adapters = adapt(base)
    adapters.open(random_branch(base, 1))
    base.model.get_parameter(stray).requires_grad_(True)
    with pytest.raises(AssertionError, match=f"trained but not planned.*{stray}"):
        adapters.assert_plan()
    base.model.get_parameter(stray).requires_grad_(False)
    with pytest.raises(AssertionError, match=stray), adapters.plan_kept():
        base.model.get_parameter(stray).requires_grad_(True)


def test_a_planned_parameter_that_does_not_train_is_noticed(base):
    adapters = adapt(base)
    adapters.open(random_branch(base, 1))
    next(iter(adapters.trainable().values())).requires_grad_(False)
    with pytest.raises(AssertionError, match=r"missing: .*lora_B"):
        adapters.assert_plan()


@pytest.mark.parametrize("history", HISTORIES)
def test_a_layer_without_room_is_simply_absent(base, batch, history):
    adapters = adapt(base, history)
    factors = random_factors(base, 4, without=(ABSENT,))
    adapters.restore([random_factors(base, 3), factors], [])
    adapters.open(random_branch(base, 5, without=(ABSENT,)))
    assert not any(ABSENT in name for name in adapters.trainable()) and len(adapters.trainable()) == 15
    assert ABSENT not in adapters.read().A
    alone = adapt(base)
    alone.restore([random_factors(base, 3)], [])
    adapters.restore([factors], [])
    assert logits_of(adapters.model, batch).isfinite().all()


def test_only_layers_of_the_branch_are_wrapped_however_many_there_are(tmp_path):
    """peft shortens long lists of names to common suffixes; here every tower layer has a namesake."""
    from mllm_keeplora.config import BaseConfig
    from mllm_keeplora.models import load_base
    from tests.support.tiny import write_tiny_llava

    base = load_base(BaseConfig(model=str(write_tiny_llava(tmp_path, layers=4))), "keeplora")
    assert len(base.parts.target_layers) == 30
    adapters = adapt(base)
    adapters.open(random_branch(base, 1, without=(ABSENT,)))
    wrapped = {name for name, module in base.model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == set(base.parts.target_layers) - {ABSENT}


# -- reading and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [("B",), ("A", "B")])
def test_what_was_loaded_is_what_is_read(base, train):
    factors = random_factors(base, 6)
    adapters = adapt(base)
    adapters.open(random_branch(base, 6, train=train))
    adapters.load(factors, {})
    read = adapters.read()
    assert same(read.A, factors.A) and same(read.B, factors.B) and read.alpha == factors.alpha


def test_factors_that_were_read_do_not_change_with_the_model(base):
    adapters = adapt(base)
    adapters.open(random_branch(base, 1, train=("A", "B")))
    read = adapters.read()
    for parameter in adapters.trainable().values():
        parameter.data.add_(1.0)
    assert all(not B.any() for B in read.B.values()) and same(read.A, random_branch(base, 1).A)


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


# -- the model before the branch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("learnt", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_closed_gives_the_function_before_the_branch_and_restores_everything(new_base, batch, history, learnt, fails):
    base = new_base("full")
    full = projector_parameters(base)
    past = [random_factors(base, seed) for seed in range(learnt)]
    adapters = adapt(base, history, full)
    adapters.restore(past, [random_shift(base, seed) for seed in range(learnt)])
    before = logits_of(adapters.model, batch)
    adapters.open(random_branch(base, 7, train=("A", "B")))
    adapters.load(random_factors(base, 8), {})
    for name in full:
        base.model.get_parameter(name).data.add_(0.05)
    trained, state = set(adapters.trainable()), snapshot(adapters.model)
    after = logits_of(adapters.model, batch)
    assert not torch.allclose(after, before, atol=1e-2)

    try:
        with adapters.closed():
            assert torch.equal(logits_of(adapters.model, batch), before)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(logits_of(adapters.model, batch), after)
    assert same(snapshot(adapters.model), state)
    assert set(adapters.trainable()) == trained
    adapters.assert_plan()


def test_teacher_forward_gives_the_outputs_before_the_branch_without_a_graph(base, batch):
    adapters = adapt(base)
    before = logits_of(adapters.model, batch)
    adapters.open(random_branch(base, 7))
    adapters.load(random_factors(base, 8), {})
    context = RunContext(base, adapters, {}, None, [], None, None, 4)
    outputs = context.teacher_forward(batch)
    assert torch.equal(outputs.logits, before) and not outputs.logits.requires_grad
    adapters.assert_plan()


@pytest.mark.parametrize("history", HISTORIES)
def test_weight_is_the_current_one_whatever_the_history(base, pristine, history):
    factors = random_factors(base, 1)
    adapters = adapt(base, history)
    adapters.restore([factors], [])
    adapters.open(random_branch(base, 2))
    for layer in base.parts.target_layers:
        expected = pristine[f"{layer}.weight"] + factors.delta(layer)
        assert torch.allclose(adapters.weight(layer), expected, atol=1e-6)
