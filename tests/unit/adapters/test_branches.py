"""Branches on a tiny model: opening changes nothing, what was loaded is read, and the model before is one step away."""

import pytest
import torch

from mllm_keeplora.models.causal.losses import supervised_positions
from mllm_keeplora.training.context import RunContext
from tests.unit.adapters.conftest import (
    ABSENT,
    HISTORIES,
    adapt,
    projector_parameters,
    random_branch,
    random_factors,
    random_shift,
    same,
)
from tests.unit.conftest import logits_of, snapshot

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


def test_teacher_logits_are_those_before_the_branch_without_a_graph(base, batch):
    adapters = adapt(base)
    before = logits_of(adapters.model, batch)
    adapters.open(random_branch(base, 7))
    adapters.load(random_factors(base, 8), {})
    context = RunContext(base, adapters, {}, None, [], None, None, 4)
    logits = context.passes.teacher_logits(batch)
    supervised = before[supervised_positions(batch["labels"])]
    assert torch.allclose(logits, supervised, atol=1e-5) and not logits.requires_grad
    adapters.assert_plan()


def test_a_teacher_leaves_a_training_model_in_training(base, batch):
    adapters = adapt(base)
    adapters.open(random_branch(base, 7))
    adapters.model.train()
    RunContext(base, adapters, {}, None, [], None, None, 4).passes.teacher_logits(batch)
    assert all(module.training for module in adapters.model.modules())
