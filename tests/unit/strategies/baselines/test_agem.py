"""A-GEM: the gradient that a step takes is the nearest one that does not raise the loss on buffered records."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.checks.engine import unfit_for
from mllm_keeplora.config import load_config
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.agem import AGEM, AGEMOptions
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import agem
from tests.support.strategies import alone, context_of, fit, learn, open_branch
from tests.support.tiny import COLOURS, PLACES

BATCH = 4
PLAIN = {"schedule": "constant", "warmup_ratio": 0.0, "args": {"optim": "sgd"}}
SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2)}


def strategy_of(**options):
    return AGEM(AGEMOptions(**{"rank": 4, "alpha": 8, "buffer": 6, **options}))


def adapters_of(base, dropout=0.0):
    return Adapters(base, "merged", dropout)


def answering(records, colour, place):
    """The same pictures and questions, every answer the same colour or place."""
    words = dict.fromkeys(COLOURS, colour) | dict.fromkeys(PLACES, place)
    return [
        replace(record, turns=tuple(Turn(turn.role, words.get(turn.text, turn.text)) for turn in record.turns))
        for record in records
    ]


@pytest.fixture
def domains(tiny_records):
    """Two domains at odds: what the second teaches is not what the first taught."""
    records = tiny_records["Alpha"]
    return {"first": answering(records, "red", "left"), "second": answering(records[:BATCH], "green", "right")}


def second_domain(base, records, folder, dropout=0.0, **options):
    """A strategy that has learnt the first domain, and the context of the second with its branch open.

    The second domain's words are those most at odds with the first's; which they are hangs on the random base.
    """
    adapters, strategy = adapters_of(base, dropout), strategy_of(**options)
    learn(strategy, context_of(base, adapters, records, 0), folder / "first")
    context = context_of(base, adapters, records, 1)
    open_branch(strategy, context)
    if "second" not in records:  # a test of what the first domain leaves
        return strategy, context
    reference = alone(base, adapters, references_of(strategy, context, records)[1])[1]
    choices = [answering(records["second"], colour, place) for colour in COLOURS for place in PLACES]
    records["second"] = min(choices, key=lambda chosen: agem.inner(alone(base, adapters, chosen)[1], reference))
    return strategy, context_of(base, adapters, records, 1)


def references_of(strategy, context, records, count=BATCH):
    """References of the buffered records that the next step meets, and the records."""
    drawn = Step(0, BATCH, seed=context.seed).drawn(len(strategy.buffer), count)
    references = [strategy.buffer.references[place] for place in drawn]
    return references, [list(records.values())[domain][number] for domain, number in references]


def mean_loss(base, context, records):
    return np.mean([loss for tokens in alone(base, context.branches, records)[0] for loss in tokens])


def values_of(context):
    return {name: parameter.detach().clone() for name, parameter in context.branches.trainable().items()}


def random_gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def edited(gradients, reference):
    """What a strategy with a full buffer makes of gradients, None for a parameter without one."""
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    for name, values in gradients.items():
        parameters[name].grad = None if values is None else torch.tensor(values)
    tensors = {name: torch.tensor(values) for name, values in reference.items()}
    context = SimpleNamespace(
        branches=SimpleNamespace(trainable=lambda: parameters),
        passes=SimpleNamespace(loss_gradients=lambda references: tensors),
    )
    strategy = strategy_of()
    strategy.buffer.offer(0, 3, torch.Generator())
    strategy.around_step(context, "grad", Step(0, BATCH))
    return {name: None if each.grad is None else each.grad.numpy() for name, each in parameters.items()}


def test_a_conflicting_gradient_becomes_the_projection_over_all_parameters_together():
    conflicts, mixed = 0, 0
    for seed in range(20):
        gradients, reference = random_gradients(seed), random_gradients(seed + 100)
        found, expected = edited(gradients, reference), agem.projected(gradients, reference)
        for name in SHAPES:
            assert np.allclose(found[name], expected[name], atol=1e-6)
        if agem.inner(gradients, reference) < 0:
            conflicts += 1
            assert abs(agem.inner(found, reference)) < 1e-4
            parts = [np.vdot(gradients[name], reference[name]) for name in SHAPES]
            mixed += any(part > 0 for part in parts)
        else:
            assert all(np.array_equal(found[name], gradients[name]) for name in SHAPES)
    assert 5 < conflicts < 15 and mixed, "some parameter must agree where the whole does not"


def test_no_admissible_gradient_is_nearer_than_the_projection():
    gradients, reference = random_gradients(1), random_gradients(2)
    if agem.inner(gradients, reference) >= 0:
        reference = {name: -values for name, values in reference.items()}
    best = edited(gradients, reference)
    assert agem.inner(best, reference) > -1e-5
    distance = np.linalg.norm(agem.flat(best) - agem.flat(gradients))
    rng, admissible = np.random.default_rng(0), 0
    for _ in range(200):
        other = {name: values + 0.05 * rng.standard_normal(values.shape) for name, values in best.items()}
        if agem.inner(other, reference) >= 0:
            admissible += 1
            assert np.linalg.norm(agem.flat(other) - agem.flat(gradients)) >= distance - 1e-5
    assert admissible > 50


def test_a_parameter_that_the_batch_did_not_use_counts_as_a_gradient_of_zero():
    gradients, reference = random_gradients(1), random_gradients(2)
    gradients = {**gradients, "a": np.zeros(SHAPES["a"], dtype=np.float32)}
    if agem.inner(gradients, reference) >= 0:
        reference = {name: -values for name, values in reference.items()}
    expected = agem.projected(gradients, reference)
    found = edited({**gradients, "a": None}, reference)
    for name in SHAPES:
        assert np.allclose(found[name], expected[name], atol=1e-6)
    agreeing = {name: -values for name, values in reference.items()}
    assert edited({**gradients, "a": None}, agreeing)["a"] is None


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


@pytest.mark.parametrize(("micro", "clip"), [(4, 0.0), (2, 0.0), (1, 0.0), (2, 0.05)])
def test_one_step_descends_the_projected_gradient_and_clips_it_afterwards(base, domains, tmp_path, micro, clip):
    strategy, context = second_domain(base, domains, tmp_path)
    old = references_of(strategy, context, domains)[1]
    gradient = alone(base, context.branches, domains["second"])[1]
    reference = alone(base, context.branches, old)[1]
    assert agem.inner(gradient, reference) < 0, "the domains must be at odds"
    expected = agem.projected(gradient, reference)
    norm = np.linalg.norm(agem.flat(expected))
    assert np.linalg.norm(agem.flat(expected) - agem.flat(gradient)) > 0.05 * norm and norm > clip
    before, lr = values_of(context), 0.1
    fit(strategy, context, tmp_path / "second", lr=lr, micro_batch_size=micro, max_grad_norm=clip, **PLAIN)
    scale = lr * (clip / norm if clip else 1.0)
    changes = {name: (value - before[name]).double().numpy() for name, value in values_of(context).items()}
    wanted = {name: -scale * values for name, values in expected.items()}
    assert np.linalg.norm(agem.flat(changes) - agem.flat(wanted)) < 1e-3 * np.linalg.norm(agem.flat(wanted))


def test_a_small_step_does_not_raise_the_buffered_records_loss_where_a_plain_one_does(new_base, domains, tmp_path):
    rises = {}
    for name in ("agem", "plain"):
        base = new_base()
        strategy, context = second_domain(base, domains, tmp_path)
        old = references_of(strategy, context, domains)[1]
        if name == "plain":
            strategy.load_state_dict({})
        before = mean_loss(base, context, old)
        fit(strategy, context, tmp_path / name, lr=1e-3, max_grad_norm=0.0, **PLAIN)
        rises[name] = mean_loss(base, context, old) - before
    assert rises["plain"] > 1e-4 and rises["agem"] < 0.1 * rises["plain"]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_reference_is_the_gradient_of_the_mean_over_tokens_without_dropout(base, domains, tmp_path, size):
    strategy, context = second_domain(base, domains, tmp_path, dropout=0.5)
    references, records = references_of(strategy, context, domains, 5)
    expected = alone(base, context.branches, records)[1]
    context.branches.model.train()
    context.passes.batch_size = size
    found = context.passes.loss_gradients(references)
    assert context.branches.model.training and found.keys() == expected.keys()
    for name, values in found.items():
        assert np.allclose(values.numpy(), expected[name], atol=1e-5) and values.any()
        assert context.branches.trainable()[name].grad is None


def test_the_reference_is_taken_as_a_training_runs_its_blocks(base, domains, tmp_path):
    """Checkpointed where the training is, to the same gradient; under autocast if the base is in half precision."""
    strategy, context = second_domain(base, domains, tmp_path, dropout=0.5)
    references, decoder = references_of(strategy, context, domains, 5)[0], context.branches.base
    plain, ran = context.passes.loss_gradients(references), []
    decoder.gradient_checkpointing_enable({"use_reentrant": False})
    block = next(module for module in decoder.modules() if type(module).__name__.endswith("DecoderLayer"))
    hook = block.mlp.register_forward_pre_hook(lambda *_: ran.append(torch.is_autocast_enabled("cpu")))
    try:
        found = context.passes.loss_gradients(references)
        assert len(ran) == 2 * -(-5 // context.passes.batch_size) and not any(ran), "once more in the backward pass"
        assert all(torch.allclose(found[name], values, atol=1e-6) for name, values in plain.items())
        ran.clear()
        decoder.to(torch.bfloat16)
        found = context.passes.loss_gradients(references).values()
        assert all(values.isfinite().all() for values in found) and all(ran)
    finally:
        hook.remove()
        decoder.gradient_checkpointing_disable()


def test_the_buffer_is_filled_after_a_domain_and_survives_a_restart(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path)
    assert {domain for domain, _ in strategy.buffer.references} == {0} and len(strategy.buffer) == 6
    strategy.after_domain(context)
    assert strategy.buffer.seen == 24
    write_tensors(tmp_path / "strategy.safetensors", strategy.state_dict())
    again = strategy_of()
    again.load_state_dict(read_tensors(tmp_path / "strategy.safetensors"))
    assert again.buffer.references == strategy.buffer.references
    again.load_state_dict({})
    assert len(again.buffer) == again.buffer.seen == 0


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_is_refused_in_a_sentence(engine):
    config = load_config("mini_dcl_agem", [f"deepspeed={engine}"])
    faults = unfit_for(config, build_strategy(config.strategy), int(engine[-1]))
    assert len(faults) == 1 and "agem needs the gradients between backward and step" in faults[0]
    config = load_config("mini_dcl_agem")
    assert unfit_for(config, build_strategy(config.strategy), None) == []
