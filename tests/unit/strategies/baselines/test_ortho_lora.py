"""Ortho-LoRA: what domains' gradients give up in each factor, and the step that is left; against the slow reference."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mllm_keeplora.checks.engine import unfit_for
from mllm_keeplora.config import load_config
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.ortho_lora import OrthoLoRA, OrthoLoRAOptions
from mllm_keeplora.strategies.context import Step
from tests.oracles import agem, ortho_lora
from tests.support.strategies import alone, context_of, fit, learn, open_branch
from tests.unit.strategies.baselines.test_agem import BATCH, PLAIN, adapters_of, answering, references_of

SHAPES = {"q.lora_A.open.weight": (2, 5), "q.lora_B.open.weight": (4, 2), "v.lora_A.open.weight": (2, 3), "full": (3,)}
GROUPS = {
    "matrix": [[name] for name in SHAPES],
    "factor": [["q.lora_A.open.weight", "v.lora_A.open.weight"], ["q.lora_B.open.weight"], ["full"]],
    "global": [list(SHAPES)],
}


def strategy_of(**options):
    return OrthoLoRA(OrthoLoRAOptions(**{"rank": 4, "alpha": 8, "buffer": 6, **options}))


def random_gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def agreeing(gradients):
    return [gradients, {name: 2 * values for name, values in gradients.items()}]


def edited(gradients, step=None, names=None, strategy=None, **options):
    """The gradient that a step takes where the domain's and earlier ones' are given; and what the passes were asked."""
    strategy, asked = strategy or strategy_of(buffer=50, **options), []
    parameters = {name: torch.nn.Parameter(torch.zeros(SHAPES[name])) for name in names or SHAPES}
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor(gradients[0][name])

    def loss_gradients(references):
        asked.append(references)
        number = len(asked)  # domains come in order
        return {name: torch.tensor(gradients[number][name]) for name in parameters}

    context = SimpleNamespace(
        branches=SimpleNamespace(trainable=lambda: parameters),
        passes=SimpleNamespace(loss_gradients=loss_gradients),
    )
    if not len(strategy.buffer):
        for domain in range(len(gradients) - 1):
            strategy.buffer.offer(domain, 8, torch.Generator().manual_seed(0))
    strategy.around_step(context, "grad", step or Step(0, 16))
    return {name: each.grad.numpy() for name, each in parameters.items()}, asked


def shares(asked, records=16):
    counts = [records, *map(len, asked)]
    return [count / sum(counts) for count in counts]


def expected(gradients, names, orders, weights):
    flat = [np.concatenate([each[name].ravel() for name in names]) for each in gradients]
    return ortho_lora.combined(flat, orders, weights)


def flat(gradients, names):
    return np.concatenate([gradients[name].ravel() for name in names])


@pytest.mark.parametrize("granularity", GROUPS)
def test_two_domains_take_the_step_of_the_reference(granularity):
    acted = 0
    for seed in range(10):
        gradients = [random_gradients(seed), random_gradients(seed + 100)]
        found, asked = edited(gradients, granularity=granularity)
        plain = [np.float64(0.5)] * 2
        assert shares(asked) == plain
        for names in GROUPS[granularity]:
            wanted = expected(gradients, names, ([1], [0]), plain)
            acted += not np.allclose(wanted, expected(gradients, names, ([], []), plain))
            assert np.allclose(flat(found, names), wanted, atol=1e-5)
    assert acted > 2


def test_three_domains_meet_in_one_order_that_the_step_draws():
    drawn, gradients = set(), [random_gradients(seed) for seed in (1, 2, 3)]
    for name in SHAPES:  # less their mean they are at odds
        mean = sum(each[name] for each in gradients) / 3
        for each in gradients:
            each[name] = each[name] - mean
    for number in range(20):
        found, asked = edited(gradients, Step(number, 16, seed=5))
        again, _ = edited(gradients, Step(number, 16, seed=5))
        assert all(np.array_equal(found[name], again[name]) for name in SHAPES)
        fitting = [
            orders
            for orders in product(*([(1, 2), (2, 1)], [(0, 2), (2, 0)], [(0, 1), (1, 0)]))
            if all(
                np.allclose(found[name].ravel(), expected(gradients, [name], orders, shares(asked)), atol=1e-5)
                for name in SHAPES
            )
        ]
        assert fitting, "an order that holds for all matrices"
        drawn.add(fitting[0])
    assert len(drawn) > 1


@pytest.mark.parametrize("granularity", GROUPS)
def test_without_a_conflict_the_step_is_the_plain_weighted_sum_bit_for_bit(granularity):
    gradients = agreeing(random_gradients(1))
    found, _ = edited(gradients, granularity=granularity)
    for name in SHAPES:
        one, other = (torch.tensor(each[name]) for each in gradients)
        assert np.array_equal(found[name], (0.5 * one + 0.5 * other).numpy())


def test_one_sided_the_batch_alone_gives_up_in_each_matrix_and_grows_no_longer():
    cut = 0
    for seed in range(10):
        gradients = [random_gradients(seed), random_gradients(seed + 50)]
        found, _ = edited(gradients, mode="one_sided")
        for name in SHAPES:
            own, other = gradients[0][name].ravel(), gradients[1][name].ravel()
            assert found[name].ravel() @ other > -1e-5
            assert np.linalg.norm(found[name]) <= np.linalg.norm(own) + 1e-6
            cut += not np.array_equal(found[name].ravel(), own)
    assert 5 < cut < 35


def test_one_sided_and_global_with_one_earlier_domain_is_a_gem():
    conflicts = 0
    for seed in range(10):
        gradients = [random_gradients(seed), random_gradients(seed + 100)]
        found, _ = edited(gradients, mode="one_sided", granularity="global")
        wanted = agem.projected(*gradients)
        conflicts += agem.inner(*gradients) < 0
        assert all(np.allclose(found[name], wanted[name], atol=1e-5) for name in SHAPES)
    assert 2 < conflicts < 8


@pytest.mark.parametrize("granularity", GROUPS)
def test_the_order_of_parameters_changes_nothing(granularity):
    gradients = [random_gradients(seed) for seed in (1, 2, 3)]
    found, _ = edited(gradients, granularity=granularity)
    turned, _ = edited(gradients, names=list(reversed(SHAPES)), granularity=granularity)
    assert all(np.allclose(found[name], turned[name], atol=1e-6) for name in SHAPES)


@pytest.mark.parametrize("granularity", ["matrix", "factor"])
def test_what_a_gives_up_does_not_depend_on_b(granularity):
    gradients, others = ([random_gradients(seed) for seed in seeds] for seeds in ((1, 2, 3), (4, 5, 6)))
    mixed = [
        {name: (other if ".lora_B." in name else each)[name] for name in SHAPES}
        for each, other in zip(gradients, others, strict=True)
    ]
    (found, _), (changed, _) = (edited(each, granularity=granularity) for each in (gradients, mixed))
    for name in SHAPES:
        assert np.array_equal(found[name], changed[name]) == (".lora_B." not in name), name


def test_processes_ask_for_the_same_domains_whatever_their_share():
    gradients = [random_gradients(seed) for seed in range(4)]
    _, whole = edited(gradients, Step(0, 3))
    shared = [edited(gradients, Step(0, 3, share=(rank, 2)))[1] for rank in (0, 1)]
    assert [len(asked) for asked in shared] == [len(whole)] * 2 and len(whole) > 1
    for together, *parts in zip(whole, *shared, strict=True):
        assert sorted(together) == sorted(parts[0] + parts[1])
    assert not all(all(asked) for asked in shared), "a process with none of a domain"


def test_how_often_gradients_were_cut_outlives_an_interruption():
    conflicting, calm = [random_gradients(1), {n: -v for n, v in random_gradients(1).items()}], random_gradients(1)
    strategy = strategy_of(buffer=50)
    edited(conflicting, strategy=strategy)
    again = strategy_of(buffer=50)
    again.load_state_dict(strategy.state_dict())
    again.load_training_state(strategy.training_state())
    edited(agreeing(calm), strategy=again)
    logged = {}
    domain = SimpleNamespace(index=1)
    data = SimpleNamespace(records=[None] * 8)
    again.after_domain(SimpleNamespace(domain=domain, data=data, rng=torch.Generator(), log=logged.update))
    assert logged == {"gradients_cut": 0.5}
    again.load_training_state({})
    assert not again.met.any()


@pytest.mark.parametrize("micro", [4, 1])
def test_one_step_descends_what_the_reference_makes_of_both_gradients(base, tiny_records, tmp_path, micro):
    records = tiny_records["Alpha"]
    domains = {"first": answering(records, "red", "left"), "second": answering(records[:BATCH], "green", "right")}
    adapters, strategy = adapters_of(base), strategy_of()
    learn(strategy, context_of(base, adapters, domains, 0), tmp_path / "first")
    context = context_of(base, adapters, domains, 1)
    open_branch(strategy, context)
    old = references_of(strategy, context, domains)[1]
    gradients = [alone(base, adapters, each)[1] for each in (domains["second"], old)]
    wanted = {name: expected(gradients, [name], ([1], [0]), [0.5, 0.5]) for name in gradients[0]}
    plain = {name: expected(gradients, [name], ([], []), [0.5, 0.5]) for name in gradients[0]}
    assert any(not np.allclose(wanted[name], plain[name], rtol=1e-2) for name in wanted), "domains must be at odds"
    before, lr = {name: each.detach().clone() for name, each in adapters.trainable().items()}, 0.1
    fit(strategy, context, tmp_path / "second", lr=lr, micro_batch_size=micro, max_grad_norm=0.0, **PLAIN)
    for name, each in adapters.trainable().items():
        change = (each.detach() - before[name]).double().numpy().ravel()
        assert np.linalg.norm(change + lr * wanted[name]) < 1e-3 * lr * np.linalg.norm(wanted[name]) + 1e-7, name


def test_deepspeed_is_refused_and_a_gradient_for_each_domain_estimated():
    config = load_config("mini_dcl_ortho_lora", ["deepspeed=zero2"])
    faults = unfit_for(config, build_strategy(config.strategy), 2)
    assert len(faults) == 1 and "ortho_lora needs the gradients between backward and step" in faults[0]
    sizes = SimpleNamespace(micro=1, probe=2, rank=4, numbers=100, domains=5, graph=lambda batch, rank: 10.0 * batch)
    assert strategy_of().footprint(sizes) == {"train": {"graph": 20.0, "gradients of domains": 2000}}
