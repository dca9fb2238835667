"""O-LoRA: what the penalty is, what it moves, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.strategies.subspace.olora import OLoRA, OLoRAOptions, overlap
from tests.oracles import olora as oracle
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import HISTORIES, adapt, random_factors
from tests.unit.conftest import encode, logits_of, snapshot

SMALL = {"rank": 3, "alpha": 6.0}
PENALTIES = ("l1", "l2sq")


def strategy_of(**options):
    return OLoRA(OLoRAOptions(**{**SMALL, **options}))


def begun(base, records, past=2, index=1, history="merged", **options):
    """A strategy whose branch is open after some random branches, with a B that is not zero."""
    adapters = adapt(base, history)
    adapters.restore([random_factors(base, seed) for seed in range(past)], [])
    strategy, context = strategy_of(**options), context_of(base, adapters, records, index)
    open_branch(strategy, context)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapters.trainable().items():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return strategy, context


def expected(context, lambda1, lambda2, kind):
    trained = context.branches.read()
    past = [factors.A for factors in context.branches.past]
    return oracle.penalty(past, trained.A, trained.B, lambda1, lambda2, kind)


def layer_of(name):
    return name.removeprefix("base_model.model.").split(".lora_")[0]


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.5, 0.0), (0.0, 0.1), (0.3, 0.2)])
def test_the_term_is_the_sum_over_layers_and_earlier_domains(base, tiny_records, kind, lambda1, lambda2):
    strategy, context = begun(base, tiny_records, penalty=kind, lambda1=lambda1, lambda2=lambda2)
    found = strategy.extra_loss(context, {}, None, Step(0, 4)).item()
    assert found == pytest.approx(expected(context, lambda1, lambda2, kind), rel=1e-5) and found > 0.1


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_gradient_of_the_overlaps_reaches_the_open_a_alone(base, tiny_records, kind):
    strategy, context = begun(base, tiny_records, penalty=kind, lambda1=0.5)
    branches = context.branches
    everything = dict(branches.model.named_parameters())
    for parameter in everything.values():
        parameter.requires_grad_(True)
    strategy.extra_loss(context, {}, None, Step(0, 4)).backward()
    reached = {name for name, parameter in everything.items() if parameter.grad is not None}
    assert reached == {name for name in branches.trainable() if ".lora_A." in name} and len(reached) == 16
    for name in reached:
        layer = layer_of(name)
        past = [factors.A[layer] for factors in branches.past]
        wanted = 0.5 * oracle.overlap_gradient(past, everything[name].detach(), kind)
        assert np.allclose(everything[name].grad, wanted, atol=1e-5)


def test_the_gradient_of_the_norms_is_finite_where_b_starts(base, tiny_records):
    strategy, context = begun(base, tiny_records, past=0, index=0, lambda2=1.0)
    for name, parameter in context.branches.trainable().items():
        if ".lora_B." in name:
            parameter.data.zero_()
    strategy.extra_loss(context, {}, None, Step(0, 4)).backward()
    for name, parameter in context.branches.trainable().items():
        length = parameter.grad.norm()
        assert length == 0 if ".lora_B." in name else length == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_penalty_is_zero_for_orthogonal_rows_and_blind_to_their_order(kind):
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0].T
    past, inside = 3 * basis[:5], torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    assert overlap(past, 2 * basis[5:8], kind) < 1e-5
    whole = overlap(past, inside, kind)
    assert whole > 1
    assert overlap(past[[3, 0, 4, 1, 2]], inside[[2, 0, 1]], kind) == pytest.approx(float(whole), rel=1e-5)


def test_the_first_domain_has_no_penalty(base, tiny_records):
    strategy, context = begun(base, tiny_records, past=0, index=0)
    assert strategy.extra_loss(context, {}, None, Step(0, 4)) == 0.0
    strategy.after_domain(context)
    assert context.facts == {}


def test_without_weights_it_is_sequential_lora_with_fresh_branches_bit_for_bit(new_base, tiny_records, tmp_path):
    found = []
    for strategy in (strategy_of(lambda1=0.0), Finetune(FinetuneOptions(**SMALL, branch="incremental"))):
        base = new_base()
        adapters = adapt(base)
        where = tmp_path / type(strategy).__name__
        found.append([learn(strategy, context_of(base, adapters, tiny_records, i), where / str(i)) for i in range(2)])
    for ours, theirs in zip(*found, strict=True):
        for layer in ours.A:
            assert torch.equal(ours.A[layer], theirs.A[layer]) and torch.equal(ours.B[layer], theirs.B[layer])
            assert ours.B[layer].any()


@pytest.mark.parametrize("history", HISTORIES)
def test_training_lowers_the_overlap_and_changes_nothing_earlier(new_base, tiny_records, tmp_path, history):
    overlaps = {}
    for lambda1 in (0.0, 0.5):
        base = new_base()
        adapters, strategy = adapt(base, history), strategy_of(lambda1=lambda1)
        learn(strategy, context_of(base, adapters, tiny_records, 0), tmp_path / f"{lambda1}a")
        context = context_of(base, adapters, tiny_records, 1)
        open_branch(strategy, context)
        before, first = snapshot(adapters.model), adapters.past[0]
        kept = {layer: (first.A[layer].clone(), first.B[layer].clone()) for layer in first.A}
        fit(strategy, context, tmp_path / f"{lambda1}b", epochs=4.0)
        strategy.after_domain(context)
        after = snapshot(adapters.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(adapters.trainable()) and len(changed) == 32
        for layer, (A, B) in kept.items():
            assert torch.equal(first.A[layer], A) and torch.equal(first.B[layer], B)
        overlaps[lambda1] = context.facts["overlap_per_layer"]
    assert overlaps[0.5] < 0.5 * overlaps[0.0]


def test_branches_that_run_as_factors_answer_as_merged_ones(new_base, tiny_records, tmp_path):
    base = new_base()
    adapters, strategy = adapt(base), strategy_of()
    past = [learn(strategy, context_of(base, adapters, tiny_records, i), tmp_path / str(i)) for i in range(2)]
    batch = encode(base, tiny_records["Beta"][:4])
    merged = logits_of(adapters.model, batch)
    beside = adapt(new_base(), "factors")
    beside.restore(past, [])
    assert torch.allclose(logits_of(beside.model, batch), merged, atol=1e-4)
    beside.restore(past[:1], [])
    assert not torch.allclose(logits_of(beside.model, batch), merged, atol=1e-2)


def test_micro_batches_divide_the_penalty_as_they_divide_the_loss(new_base, tiny_records, tmp_path):
    records = {"Alpha": tiny_records["Alpha"], "Beta": tiny_records["Beta"][0:8:2]}
    found = []
    for micro in (4, 1):
        base = new_base()
        adapters, strategy = adapt(base), strategy_of(lambda1=0.1, lambda2=0.1)
        adapters.restore([random_factors(base, 0)], [])
        context = context_of(base, adapters, records, 1)
        open_branch(strategy, context)
        options = {"lr": 0.1, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0}
        fit(strategy, context, tmp_path / str(micro), micro_batch_size=micro, args={"optim": "sgd"}, **options)
        found.append(adapters.read())
    for layer in found[0].A:
        assert not torch.allclose(found[0].A[layer], adapters.branch.A[layer], atol=1e-3)
        assert torch.allclose(found[0].A[layer], found[1].A[layer], atol=1e-5)


def test_earlier_directions_are_gathered_once_a_domain(base, tiny_records, tmp_path, monkeypatch):
    from mllm_keeplora.strategies.subspace import olora

    real, calls = olora._past_by_layer, []

    def counted(context, trained):
        calls.append(context.domain.name)
        return real(context, trained)

    monkeypatch.setattr(olora, "_past_by_layer", counted)
    adapters, strategy = adapt(base), strategy_of()
    records = {name: tiny_records["Alpha"][:8] for name in ("one", "two", "three")}
    for index in range(3):
        context = context_of(base, adapters, records, index)
        open_branch(strategy, context)
        calls.clear()
        fit(strategy, context, tmp_path / str(index))
        assert calls == [context.domain.name]
        found = strategy.extra_loss(context, {}, None, Step(0, 4))
        assert (found.item() if index else found) == pytest.approx(expected(context, 0.5, 0, "l1"), rel=1e-4)
        adapters.restore([*adapters.past, adapters.read()], [])


def test_a_run_that_is_taken_up_again_sees_the_branches_of_now(base, tiny_records):
    """The state is loaded, and the branch opened from its file, without `before_domain`."""
    strategy, context = begun(base, tiny_records)
    strategy.extra_loss(context, {}, None, Step(0, 4))
    branches = context.branches
    branch = branches.branch
    branches.restore([random_factors(base, 5)], [])
    strategy.load_state_dict({})
    branches.open(branch)
    assert strategy.state_dict() == {}
    loss = strategy.extra_loss(context, {}, None, Step(0, 4))
    assert loss.item() == pytest.approx(expected(context, 0.5, 0, "l1"), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in branches.trainable().items() if ".lora_A." in name)


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_overlap_of_every_layer_is_reported(base, tiny_records, kind):
    strategy, context = begun(base, tiny_records, penalty=kind)
    strategy.after_domain(context)
    trained, past = context.branches.read(), context.branches.past
    assert context.facts["overlap"].keys() == set(context.layers.names)
    for layer, found in context.facts["overlap"].items():
        wanted = oracle.overlap([factors.A[layer] for factors in past], trained.A[layer], kind)
        assert found == pytest.approx(wanted, rel=1e-4)
    mean = np.mean(list(context.facts["overlap"].values()))
    assert context.facts["overlap_per_layer"] == pytest.approx(mean)


def test_a_list_gives_each_domain_its_own_weight(base, tiny_records):
    strategy, context = begun(base, tiny_records, lambda1=[0.0, 0.25], lambda2=[0.5, 0.0])
    found = strategy.extra_loss(context, {}, None, Step(0, 4)).item()
    assert found == pytest.approx(expected(context, 0.25, 0.0, "l1"), rel=1e-5)


def test_a_list_that_ends_before_the_sequence_is_refused_before_training(base, tiny_records):
    with pytest.raises(UserError, match=r"strategy\.lambda2 lists 1 numbers, but Beta is domain 2"):
        begun(base, tiny_records, lambda2=[0.5])


@pytest.mark.parametrize("value", [-0.1, [0.5, -1.0], [], float("nan")])
def test_a_weight_that_is_no_weight_is_refused(value):
    with pytest.raises(UserError, match=r"strategy\.lambda1"):
        build_strategy(StrategyConfig(name="olora", lambda1=value))


def test_the_registry_builds_it_with_the_published_numbers():
    strategy = build_strategy(StrategyConfig(name="olora"))
    options = strategy.options
    assert (options.rank, options.alpha, options.lambda1, options.lambda2, options.penalty) == (8, 32.0, 0.5, 0.0, "l1")
    assert strategy.needs == {"parameters"} and strategy.combine == "merge"
    assert {name: build_strategy(StrategyConfig(name="olora", preset=name)).options.rank for name in OLoRA.presets} == {
        "mllm_dcl": 32,
        "ucit": 16,
        "prism": 16,
        "prism-coin": 8,
    }
