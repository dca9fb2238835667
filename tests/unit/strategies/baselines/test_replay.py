"""Replay: what joins a batch, that the loss is the joint mean, and that a resumed training replays the same."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.baselines.replay import Replay, ReplayOptions
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import replay
from tests.support.strategies import alone, context_of, fit, learn, open_branch
from tests.unit.conftest import encode

BATCH = 4
PLAIN = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "args": {"optim": "sgd"}}


def strategy_of(**options):
    return Replay(ReplayOptions(**{"rank": 4, "alpha": 8, "buffer": 6, **options}))


def adapters_of(base):
    return Adapters(base, "merged", 0.0)


def second_domain(base, records, folder, **options):
    """A strategy that has learnt the first domain, and the context of the second with its branch open."""
    adapters, strategy = adapters_of(base), strategy_of(**options)
    learn(strategy, context_of(base, adapters, records, 0), folder / "first")
    context = context_of(base, adapters, records, 1)
    open_branch(strategy, context)
    return strategy, context


def watch(strategy):
    """Every (optimizer step, references) that the strategy draws from now on."""
    draw, seen = type(strategy).drawn, []

    def drawn(step, count=None):
        seen.append((step.number, draw(strategy, step, count)))
        return seen[-1][1]

    strategy.drawn = drawn
    return seen


def values_of(context):
    return {name: parameter.detach().clone() for name, parameter in context.branches.trainable().items()}


def test_the_first_domain_is_plain_sequential_lora_bit_for_bit(new_base, tiny_records, tmp_path):
    plain = Finetune(FinetuneOptions(rank=4, alpha=8, branch="carried"))
    learnt = []
    for strategy in (strategy_of(), plain):
        base = new_base()
        context = context_of(base, adapters_of(base), tiny_records, 0)
        learnt.append(learn(strategy, context, tmp_path / type(strategy).__name__))
    for layer in learnt[0].A:
        assert torch.equal(learnt[0].A[layer], learnt[1].A[layer])
        assert torch.equal(learnt[0].B[layer], learnt[1].B[layer]) and learnt[0].B[layer].any()


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_one_step_descends_the_joint_mean_over_new_and_buffered_tokens(base, tiny_records, tmp_path, micro, ratio):
    records = {**tiny_records, "Beta": tiny_records["Beta"][:BATCH]}
    strategy, context = second_domain(base, records, tmp_path, ratio=ratio)
    drawn = Step(0, BATCH, seed=context.seed).drawn(len(strategy.buffer), round(ratio * BATCH))
    references = [strategy.buffer.references[place] for place in drawn]
    old = [records["Alpha"][number] for _, number in references]
    losses, gradient = alone(base, context.branches, [*records["Beta"], *old])
    assert {domain for domain, _ in references} == {0} and len({len(tokens) for tokens in losses}) > 1
    before, lr = values_of(context), 0.1
    fit(strategy, context, tmp_path / "second", lr=lr, micro_batch_size=micro, **PLAIN)
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    expected = replay.joint_mean_loss(losses[:BATCH], losses[BATCH:])
    assert len(rows) == 1 and rows[0]["loss"] == pytest.approx(expected, abs=2e-4)
    assert abs(expected - replay.joint_mean_loss(losses[:BATCH], [])) > 1e-2, "buffered tokens must count"
    for name, value in values_of(context).items():
        change = (value - before[name]).double().numpy()
        assert np.linalg.norm(change + lr * gradient[name]) <= 1e-3 * np.linalg.norm(lr * gradient[name]) + 1e-7, name


def test_only_earlier_domains_are_replayed_and_a_short_batch_gets_fewer(base, tiny_records, tmp_path):
    records = {**tiny_records, "Gamma": tiny_records["Beta"][:10]}
    adapters, strategy = adapters_of(base), strategy_of(ratio=0.5)
    seen = {}
    for index, name in enumerate(records):
        context = context_of(base, adapters, records, index)
        seen[name] = watch(strategy)
        learn(strategy, context, tmp_path / name, micro_batch_size=2, epochs=2.0)
    assert seen["Alpha"] == []
    for index, (name, sizes) in enumerate({"Beta": [4, 4, 4] * 2, "Gamma": [4, 4, 2] * 2}.items(), start=1):
        counts = Counter()
        for step, references in seen[name]:
            assert all(domain < index for domain, _ in references)
            counts[step] += len(references)
        assert [counts[step] for step in range(6)] == [size // 2 for size in sizes]
    assert {domain for _, references in seen["Gamma"] for domain, _ in references} == {0, 1}


def test_an_epoch_replays_as_many_records_as_the_buffer_has(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path, ratio="epoch", buffer=5)
    seen, epochs = watch(strategy), 200
    steps = range(epochs * 3)  # twelve records, four a step
    counts = [len(strategy.drawn(Step(n, BATCH, seed=1), strategy._part(Step(n, BATCH, seed=1), 12))) for n in steps]
    assert len(seen) == len(counts) and set(counts) == {1, 2} and sum(counts) == pytest.approx(5 * epochs, rel=0.05)
    few = [strategy._part(Step(n, BATCH, seed=1), 1200) for n in range(1000)]
    assert set(few) == {0, 1} and sum(few) == pytest.approx(1000 * 5 / 300, rel=0.5), "a step may have none"
    records = {**tiny_records, "Beta": tiny_records["Beta"][:BATCH]}
    strategy, context = second_domain(base, records, tmp_path / "whole", ratio="epoch")
    seen = watch(strategy)
    fit(strategy, context, tmp_path / "second", **PLAIN)
    assert sum(len(references) for _, references in seen) == len(strategy.buffer)


@pytest.mark.parametrize("places", [1, 2, 3, 8])
def test_the_draws_of_a_step_are_dealt_out_whole_whatever_the_micro_batches_and_processes(places):
    step = Step(0, BATCH, seed=2)
    whole = step.drawn(50, 5)
    shares = []
    for place in range(places):
        shares += replace(step, share=(place, places)).drawn(50, 5)
    assert sorted(shares) == sorted(whole) and len(whole) == 5
    assert replace(step, number=1).drawn(50, 5) != whole, "every step draws anew"


def test_a_micro_batch_without_a_share_is_left_as_it_is(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path, ratio=0.01)
    batch = encode(base, tiny_records["Beta"][:2])
    assert strategy.batch(context, batch, Step(0, BATCH, share=(1, 4))) is batch
    joined = strategy.batch(context, batch, Step(0, BATCH, share=(0, 4)))
    assert len(joined["labels"]) == 3, "one record at least, whatever the ratio"


def test_a_domain_of_several_epochs_is_offered_to_the_buffer_once(base, tiny_records, tmp_path):
    adapters, strategy = adapters_of(base), strategy_of(buffer=100)
    for index, name in enumerate(tiny_records):
        learn(strategy, context_of(base, adapters, tiny_records, index), tmp_path / name, epochs=2.0 - index)
    assert sorted(strategy.buffer.references) == [(domain, number) for domain in range(2) for number in range(12)]


def test_a_file_of_an_earlier_domain_is_read_once(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path)
    read = []
    context.data.sources.trained = lambda name: read.append(name) or tiny_records[name]
    fit(strategy, context, tmp_path / "second")
    assert read == ["Alpha"]


def test_a_training_resumed_from_a_checkpoint_replays_the_same_and_ends_the_same(new_base, tiny_records, tmp_path):
    ends, drawn = [], []
    for _ in range(2):
        strategy, context = second_domain(new_base(), tiny_records, tmp_path)
        drawn.append(watch(strategy))
        args = {"save_strategy": "steps"}
        fit(strategy, context, tmp_path / "second", args=args, epochs=2.0, checkpoint_steps=2, micro_batch_size=2)
        ends.append(values_of(context))
        shutil.rmtree(tmp_path / "second/checkpoints/checkpoint-6")
    assert {step for step, _ in drawn[0]} == set(range(6)) and {step for step, _ in drawn[1]} == {4, 5}
    assert drawn[1] == [(step, references) for step, references in drawn[0] if step >= 4]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_buffer_survives_a_restart_and_is_empty_at_the_start(base, tiny_records, tmp_path):
    strategy, _ = second_domain(base, tiny_records, tmp_path)
    write_tensors(tmp_path / "strategy.safetensors", strategy.state_dict())
    again = strategy_of()
    again.load_state_dict(read_tensors(tmp_path / "strategy.safetensors"))
    assert again.buffer.references == strategy.buffer.references and len(again.buffer) == 6
    again.load_state_dict({})
    assert len(again.buffer) == again.buffer.seen == 0
