"""RegLoRA: which entries are marked, what the penalty is, what it moves, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.family import Sizes
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.strategies.footprint import PassSizes
from mllm_keeplora.strategies.subspace.reglora import RegLoRA, RegLoRAOptions
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import reglora as oracle
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import HISTORIES, adapt, random_factors
from tests.unit.conftest import snapshot

SMALL = {"rank": 3, "alpha": 6.0}
OVERLAPS = ("union", "multiset")


def strategy_of(**options) -> RegLoRA:
    return RegLoRA(RegLoRAOptions(**{**SMALL, **options}))


def with_random_b(adapters, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.trainable().items():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)


def learnt(base, records, **options):
    """A strategy after three domains whose training is a draw, the open one of a fourth, and what was marked."""
    adapters, state, told, shares = adapt(base), {}, [], []
    records = dict(zip("abcd", [records["Alpha"]] * 4, strict=True))
    for index in range(4):
        strategy = strategy_of(**options)  # a new object: nothing lasts but its state
        strategy.load_state_dict(state)
        context = context_of(base, adapters, records, index)
        open_branch(strategy, context)
        with_random_b(adapters, index % 3)  # the last trained one is as the first
        if index < 3:
            strategy.after_domain(context)
            told.append(adapters.read())
            shares.append(context.facts["marked_share"])
            adapters.restore([*adapters.past, told[-1]], [])
            state = strategy.state_dict()
    return strategy, context, told, shares


def wanted_counts(told, layer, overlap, share="0.02"):
    marked = [oracle.largest(each.A[layer], each.B[layer], share) for each in told]
    return oracle.weights(marked, told[0].delta(layer).shape, overlap)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_marks_are_the_largest_entries_of_each_finished_update(base, tiny_records, overlap):
    strategy, context, told, shares = learnt(base, tiny_records, overlap=overlap)
    assert strategy.marks.keys() == set(context.layers.names) and len(strategy.marks) == 16
    entries, marked = 0, 0
    for layer, marks in strategy.marks.items():
        d_in = context.layers.d_in(layer)
        planes = [np.unpackbits(plane.numpy(), axis=1, bitorder="little")[:, :d_in] for plane in marks]
        found = sum(plane.astype(float) * 2**place for place, plane in enumerate(planes))
        wanted = wanted_counts(told, layer, overlap)
        assert np.array_equal(found, wanted), layer
        assert overlap == "union" or wanted.sum() == 3 * int(0.02 * wanted.size)
        entries, marked = entries + wanted.size, marked + (wanted > 0).sum()
        assert marks.nbytes == len(marks) * len(wanted) * -(-d_in // 8)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(marked / entries) and shares[0] < 0.02


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_term_and_its_gradients_are_those_of_the_equations(base, tiny_records, overlap):
    strategy, context, told, _ = learnt(base, tiny_records, overlap=overlap, strength=50.0)
    with_random_b(context.branches, 9)
    now, loss = context.branches.read(), strategy.extra_loss(context, {}, None, Step(0, 4))
    loss.backward()
    counts = {layer: wanted_counts(told, layer, overlap) for layer in now.A}
    assert loss.item() == pytest.approx(oracle.penalty(now.A, now.B, counts, 50.0), rel=1e-5) and loss > 0.1
    trained = context.branches.trainable()
    for layer in list(now.A)[::5]:
        pulls = oracle.gradients(now.A[layer], now.B[layer], counts[layer])
        for part, pull in zip("AB", pulls, strict=True):
            gradient = trained[f"base_model.model.{layer}.lora_{part}.domain.weight"].grad
            assert np.allclose(gradient, 50.0 / 16 * pull, atol=1e-5) and np.abs(pull).max() > 1e-3
    frozen = [n for n, p in context.branches.model.named_parameters() if n not in trained and p.grad is not None]
    assert not frozen and all(parameter.grad is not None for parameter in trained.values())


def test_the_first_domain_has_no_penalty_and_a_strength_of_zero_none_ever(base, tiny_records, monkeypatch):
    adapters = adapt(base)
    strategy, context = strategy_of(), context_of(base, adapters, tiny_records, 0)
    open_branch(strategy, context)
    assert strategy.extra_loss(context, {}, None, Step(0, 4)) == 0.0
    adapters.restore([], [])
    strategy, context, *_ = learnt(base, tiny_records, strength=0.0)
    monkeypatch.setattr("mllm_keeplora.linalg.marked_mean", None)
    found = strategy.extra_loss(context, {}, None, Step(0, 4))
    assert isinstance(found, float) and found == 0.0 and strategy.marks


def test_a_branch_that_begins_is_pulled_nowhere(base, tiny_records):
    strategy, context, *_ = learnt(base, tiny_records)
    for name, parameter in context.branches.trainable().items():
        if ".lora_B." in name:
            parameter.data.zero_()
    loss = strategy.extra_loss(context, {}, None, Step(0, 4))
    loss.backward()
    assert loss == 0 and not any(parameter.grad.any() for parameter in context.branches.trainable().values())


def test_without_strength_it_is_sequential_lora_with_fresh_branches_bit_for_bit(new_base, tiny_records, tmp_path):
    found = []
    for strategy in (strategy_of(strength=0.0), Finetune(FinetuneOptions(**SMALL, branch="incremental"))):
        base = new_base()
        adapters = adapt(base)
        where = tmp_path / type(strategy).__name__
        found.append([learn(strategy, context_of(base, adapters, tiny_records, i), where / str(i)) for i in range(2)])
    for ours, theirs in zip(*found, strict=True):
        for layer in ours.A:
            assert torch.equal(ours.A[layer], theirs.A[layer]) and torch.equal(ours.B[layer], theirs.B[layer])
            assert ours.B[layer].any()


@pytest.mark.parametrize("history", HISTORIES)
def test_training_keeps_marked_entries_small_and_changes_nothing_earlier(new_base, tiny_records, tmp_path, history):
    sizes = {}
    for strength in (0.0, 50.0):
        base = new_base()
        adapters, strategy = adapt(base, history), strategy_of(strength=strength)
        first = learn(strategy, context_of(base, adapters, tiny_records, 0), tmp_path / f"{strength}a")
        context = context_of(base, adapters, tiny_records, 1)
        open_branch(strategy, context)
        before = snapshot(adapters.model)
        fit(strategy, context, tmp_path / f"{strength}b", epochs=2.0)
        after = snapshot(adapters.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(adapters.trainable()) and len(changed) == 32
        now = adapters.read()
        counts = {layer: wanted_counts([first], layer, "union") for layer in list(now.A)[:4]}
        sizes[strength] = sum(oracle.mean_of_marked(now.A[n], now.B[n], each) for n, each in counts.items())
    assert sizes[50.0] < 0.5 * sizes[0.0]


def test_micro_batches_divide_the_penalty_as_they_divide_the_loss(new_base, tiny_records, tmp_path):
    records, found = {"Alpha": tiny_records["Alpha"], "Beta": tiny_records["Beta"][0:8:2]}, []
    for micro in (4, 1):
        base = new_base()
        adapters, strategy = adapt(base), strategy_of(strength=5.0)
        context = context_of(base, adapters, records, 0)
        open_branch(strategy, context)
        with_random_b(adapters)
        strategy.after_domain(context)
        adapters.restore([random_factors(base, 0)], [])
        context = context_of(base, adapters, records, 1)
        open_branch(strategy, context)
        with_random_b(adapters, 8)
        start = adapters.read()
        options = {"lr": 0.1, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0}
        fit(strategy, context, tmp_path / str(micro), micro_batch_size=micro, args={"optim": "sgd"}, **options)
        found.append(adapters.read())
    for layer in found[0].A:
        for part in ("A", "B"):
            one, four = (getattr(each, part)[layer] for each in found)
            assert torch.allclose(one, four, atol=1e-5) and not torch.equal(one, getattr(start, part)[layer])


def test_what_was_marked_survives_a_stop_and_parameters_are_those_of_now(base, tiny_records, tmp_path):
    """The state is loaded from its file, and the branch opened from its own, without `before_domain`."""
    strategy, context, *_ = learnt(base, tiny_records)
    wanted = strategy.extra_loss(context, {}, None, Step(0, 4))
    write_tensors(tmp_path / "state.safetensors", strategy.state_dict())
    branches, now = context.branches, context.branches.read()
    branch, past = branches.branch, branches.past
    branches.restore(past, [])
    branches.open(branch)
    branches.load(now, {})
    strategy.load_state_dict(read_tensors(tmp_path / "state.safetensors"))
    loss = strategy.extra_loss(context, {}, None, Step(0, 4))
    loss.backward()
    assert torch.equal(loss, wanted)
    assert all(parameter.grad is not None for parameter in branches.trainable().values())
    strategy.load_state_dict({})
    assert strategy.extra_loss(context, {}, None, Step(0, 4)) == 0.0


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_the_estimate_has_a_bit_for_every_entry(overlap):
    """0.8 GB for the linear layers of LLaVA-1.5-7B."""
    wide = (*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008))
    base = Sizes(saved=1.0, input_widths=(4096,), blocks=32, width=4096, loss=1.0, cached=1.0, text=0.0)
    sizes = PassSizes(base, wide * 32, 128, 10**6, 100, 10.0, 2, 4, 1, 1, (1, 1))
    found = strategy_of(overlap=overlap).footprint(sizes)
    planes = 1 if overlap == "union" else 4
    assert found["train"]["marks"] == planes * sum(d_out * d_in for d_out, d_in in wide) * 32 / 8
    assert found["train"]["marks"] == pytest.approx(0.81e9 * planes, rel=0.01)
    assert found["consolidate"]["largest entries"] == pytest.approx(0.02 * 4096 * 11008 * 4)


@pytest.mark.parametrize(("option", "value"), [("share", 0.0), ("share", 1.5), ("strength", -1.0), ("overlap", "sum")])
def test_options_out_of_range_are_refused_in_words(option, value):
    with pytest.raises(UserError, match=rf"strategy\.{option}"):
        build_strategy(StrategyConfig(name="reglora", **{option: value}))


def test_the_registry_builds_it_with_the_published_numbers():
    strategy = build_strategy(StrategyConfig(name="reglora"))
    options = strategy.options
    assert (options.rank, options.alpha, options.share, options.strength) == (128, 256.0, 0.02, 2500.0)
    assert options.overlap == "union" and strategy.needs == {"parameters"} and strategy.combine == "merge"


@pytest.mark.parametrize(("preset", "rank"), [("mcitlib-v1-dcl", 32), ("mcitlib-v1-ucit", 16), ("mcitlib-v2-acl", 32)])
def test_presets_train_as_many_numbers_as_a_branch_of_their_rank(base, tiny_records, preset, rank):
    """And no more: rank times the sum of inputs and outputs over all layers, at a scale of two."""
    strategy, adapters = build_strategy(StrategyConfig(name="reglora", preset=preset)), adapt(base)
    context = context_of(base, adapters, tiny_records, 0)
    open_branch(strategy, context)
    widths = sum(context.layers.d_in(layer) + context.layers.d_out(layer) for layer in context.layers.names)
    assert sum(parameter.numel() for parameter in adapters.trainable().values()) == rank * widths
    assert strategy.options.alpha == 2 * rank and len(RegLoRA.presets) == 3
