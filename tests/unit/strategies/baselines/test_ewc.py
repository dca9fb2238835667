"""EWC: its F, its penalty and what they do to a training, against the slow reference and against plain LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.baselines.ewc import EWC, EWCOptions
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.context import Processes, Step
from mllm_keeplora.strategies.passes import Passes
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import ewc
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import adapt, projector_parameters, same
from tests.unit.conftest import encode

RANK, ALPHA, SAMPLES = 2, 4.0, 5
CHOSEN = (0, 2, 4, 7, 9)  # five of twelve records, evenly spaced; of one turn and of two


def strategy_of(**options) -> EWC:
    return EWC(EWCOptions(rank=RANK, alpha=ALPHA, samples=SAMPLES, **options))


def arrays(tensors) -> dict:
    return {name: tensor.detach().double().numpy().copy() for name, tensor in tensors.items()}


def gradients_of(adapters, base, records) -> list[dict]:
    """Gradient of -log p(answers of a record) by every trained parameter, float64 numpy, one record after the other."""
    theta, found = adapters.trainable(), []
    for record in records:
        batch = encode(base, [record])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        gradients = torch.autograd.grad(tokens * adapters.model(**batch).loss, list(theta.values()))
        found.append(arrays(dict(zip(theta, gradients, strict=True))))
    return found


def moved(adapters, seed) -> None:
    """Put random values into the open branch."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable().values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def penalty_of(strategy, context) -> tuple[float, dict]:
    """The penalty, and its gradient by every trained parameter."""
    theta = context.branches.trainable()
    penalty = strategy.extra_loss(context, {}, None, Step(0, 4))
    return penalty.item(), arrays(dict(zip(theta, torch.autograd.grad(penalty, list(theta.values())), strict=True)))


def close(found, expected, tolerance=1e-4) -> bool:
    assert found.keys() == expected.keys() and len(found) >= 32
    return all(np.allclose(found[name], expected[name], tolerance, 1e-8) for name in found)


def alike(one: Factors, other: Factors) -> bool:
    return same(one.A, other.A) and same(one.B, other.B)


@pytest.fixture
def few(tiny_records) -> dict:
    """Eight records a domain: two steps, of which the second has left where the domain began."""
    return {name: records[:8] for name, records in tiny_records.items()}


@pytest.fixture
def second(base, few, tmp_path):
    """Strategy and context at the start of a second domain, the first learnt."""
    strategy, adapters = strategy_of(), adapt(base)
    learn(strategy, context_of(base, adapters, few, 0), tmp_path)
    context = context_of(base, adapters, few, 1)
    open_branch(strategy, context)
    return strategy, context


# -- F -----------------------------------------------------------------------------------------------------------------


def test_f_is_the_mean_squared_gradient_of_single_records_where_training_ended(base, tiny_records, tmp_path):
    strategy, adapters = strategy_of(), adapt(base)
    context = context_of(base, adapters, tiny_records, 0)
    open_branch(strategy, context)
    fit(strategy, context, tmp_path)
    strategy.after_domain(context)
    gradients = gradients_of(adapters, base, [tiny_records["Alpha"][number] for number in CHOSEN])
    found = arrays(strategy.fisher[0])
    assert close(found, ewc.fisher(gradients))
    assert all((each >= 0).all() and each.any() for each in found.values())
    assert close(arrays(strategy.optimum[0]), arrays(adapters.trainable()), 0.0)
    assert context.facts["fisher"]["records"] == SAMPLES
    assert context.facts["fisher"]["sum"] == pytest.approx(sum(each.sum() for each in found.values()), rel=1e-4)


def test_f_of_batches_squares_the_gradient_of_their_mean_loss_over_tokens(base, tiny_records):
    """Of six records, evenly spaced, three batches of two; a batch of LAMDA-CL/Prism is one gradient."""
    strategy, adapters = EWC(EWCOptions(rank=RANK, alpha=ALPHA, samples=6, fisher_batch=2)), adapt(base)
    context = context_of(base, adapters, tiny_records, 0)
    open_branch(strategy, context)
    moved(adapters, 1)
    strategy.after_domain(context)
    theta, gradients = adapters.trainable(), []
    for first in (0, 4, 8):
        losses = adapters.model(**encode(base, [tiny_records["Alpha"][first + more] for more in (0, 2)])).loss
        gradients.append(arrays(dict(zip(theta, torch.autograd.grad(losses, list(theta.values())), strict=True))))
    assert close(arrays(strategy.fisher[0]), ewc.fisher(gradients))
    assert context.facts["fisher"]["records"] == 3


def test_processes_add_up_their_records(base, tiny_records):
    """Five records, three with one process and two with the other."""
    adapters, whole = adapt(base), strategy_of()
    context = context_of(base, adapters, tiny_records, 0)
    open_branch(whole, context)
    moved(adapters, 1)
    whole.after_domain(context)
    sums: dict[int, list[torch.Tensor]] = {}
    rank = 0

    class Share(Passes):
        def record_gradients(self, samples):
            return (each for number, each in enumerate(super().record_gradients(samples)) if number % 2 == rank)

    class Process(Processes):
        def reduce(self, tensors):
            sums.setdefault(rank, [each.clone() for each in tensors])
            for tensor, other in zip(tensors, sums.get(1 - rank, tensors), strict=True):
                tensor += other

    context.passes.__class__, context.processes.__class__ = Share, Process
    strategy_of().after_domain(context)
    rank, half = 1, strategy_of()
    half.after_domain(context)
    assert len(sums) == 2 and context.facts["fisher"]["records"] == SAMPLES
    assert close(arrays(half.fisher[0]), arrays(whole.fisher[0]), 1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.25])
def test_online_f_fades_and_separate_ones_stay(base, tiny_records, gamma):
    adapters = adapt(base)
    online, separate = strategy_of(gamma=gamma), strategy_of(mode="separate", gamma=gamma)
    open_branch(online, context_of(base, adapters, tiny_records, 0))
    optima, fishers = [], []
    for index in (0, 1, 0):
        moved(adapters, 10 + len(optima))
        for strategy in (online, separate):
            strategy.after_domain(context_of(base, adapters, tiny_records, index))
        optima.append(arrays(adapters.trainable()))
        records = list(tiny_records.values())[index]
        fishers.append(ewc.fisher(gradients_of(adapters, base, [records[number] for number in CHOSEN])))
    assert len(online.fisher) == len(online.optimum) == 1 and len(separate.fisher) == len(separate.optimum) == 3
    assert close(arrays(online.fisher[0]), ewc.online(fishers, gamma))
    assert close(arrays(online.optimum[0]), optima[-1], 0.0)
    for number in range(3):
        assert close(arrays(separate.fisher[number]), fishers[number])
        assert close(arrays(separate.optimum[number]), optima[number], 0.0)


# -- the penalty -------------------------------------------------------------------------------------------------------


def test_the_first_domain_has_no_penalty(base, tiny_records):
    strategy, context = strategy_of(), context_of(base, adapt(base), tiny_records, 0)
    open_branch(strategy, context)
    assert strategy.extra_loss(context, {}, None, Step(0, 4)) == 0.0


def test_penalty_and_its_gradient_are_zero_where_the_past_ended(second):
    penalty, gradient = penalty_of(*second)
    assert penalty == 0.0 and len(gradient) == 32
    assert all(not each.any() for each in gradient.values())


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_penalty_and_its_gradient_are_those_of_the_reference(base, tiny_records, mode):
    adapters = adapt(base)
    strategy = strategy_of(mode=mode, strength=30.0)
    context = context_of(base, adapters, tiny_records, 1)
    open_branch(strategy, context)
    for seed in (1, 2):
        moved(adapters, seed)
        strategy.after_domain(context)
    moved(adapters, 3)
    kept = [arrays(each) for each in strategy.fisher], [arrays(each) for each in strategy.optimum]
    assert len(kept[0]) == (1 if mode == "online" else 2)
    theta = arrays(adapters.trainable())
    penalty, gradient = penalty_of(strategy, context)
    assert penalty == pytest.approx(ewc.penalty(theta, *kept, 30.0), rel=1e-4) and penalty > 0
    assert close(gradient, ewc.penalty_gradient(theta, *kept, 30.0))


def test_parameters_that_are_trained_in_full_are_held_as_well(new_base, tiny_records):
    base = new_base("full")
    full = projector_parameters(base)
    adapters, strategy = adapt(base, full=full), strategy_of()
    context = context_of(base, adapters, tiny_records, 0)
    open_branch(strategy, context)
    strategy.after_domain(context)
    name = f"base_model.model.{full[0]}"
    assert len(full) == 4 and set(strategy.fisher[0]) == set(adapters.trainable())
    adapters.trainable()[name].data += 0.1
    penalty, gradient = penalty_of(strategy, context)
    assert penalty > 0 and gradient[name].any()
    assert not any(each.any() for other, each in gradient.items() if other != name)


# -- training ----------------------------------------------------------------------------------------------------------


def two_domains(strategy, base, records, folder) -> Factors:
    adapters = adapt(base)
    for index in (0, 1):
        factors = learn(strategy, context_of(base, adapters, records, index), folder / str(index), warmup_ratio=0.0)
    return factors


def test_without_strength_it_is_sequential_lora_bit_for_bit_and_with_it_it_is_not(new_base, few, tmp_path):
    plain = Finetune(FinetuneOptions(rank=RANK, alpha=ALPHA, branch="carried"))
    expected = two_domains(plain, new_base(), few, tmp_path / "plain")
    assert alike(two_domains(strategy_of(strength=0.0), new_base(), few, tmp_path / "without"), expected)
    assert not alike(two_domains(strategy_of(), new_base(), few, tmp_path / "with"), expected)


def test_the_firmer_the_hold_the_nearer_a_domain_stays_to_the_last_one(base, few, tmp_path):
    strategy, adapters = strategy_of(), adapt(base)
    learn(strategy, context_of(base, adapters, few, 0), tmp_path / "first")
    state, past, costs = strategy.state_dict(), adapters.past, []
    for strength in (0.0, 1e4):
        strategy = strategy_of(strength=strength)
        strategy.load_state_dict(state)
        context = context_of(base, adapters, few, 1)
        open_branch(strategy, context)
        fit(strategy, context, tmp_path / str(strength), epochs=4)
        held = [arrays(strategy.fisher[0])], [arrays(strategy.optimum[0])]
        costs.append(ewc.penalty(arrays(adapters.trainable()), *held, 1.0))
        adapters.restore(past, [])
    assert costs[0] > 2 * costs[1] > 0


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_what_is_read_back_from_disk_goes_on_the_same(base, few, tmp_path, mode):
    strategy, resumed = strategy_of(mode=mode, gamma=0.5), strategy_of(mode=mode, gamma=0.5)
    context = context_of(base, adapt(base), few, 0)
    open_branch(strategy, context)
    for seed in range(12):  # more than nine: names are not in the order of numbers
        moved(context.branches, seed)
        strategy.after_domain(context)
    write_tensors(tmp_path / "strategy.safetensors", strategy.state_dict())
    resumed.load_state_dict(read_tensors(tmp_path / "strategy.safetensors"))
    for seed in (20, 21):
        states = strategy.state_dict(), resumed.state_dict()
        assert len(states[0]) == (1 if mode == "online" else len(strategy.fisher)) * 2 * 32
        assert same(*states)
        moved(context.branches, seed)
        (penalty, gradient), (penalty_again, gradient_again) = (penalty_of(e, context) for e in (strategy, resumed))
        assert penalty == penalty_again > 0 and close(gradient, gradient_again, 0.0)
        strategy.after_domain(context)
        resumed.after_domain(context)
    assert len(strategy.fisher) == len(resumed.fisher) == (1 if mode == "online" else 14)


def test_an_empty_state_is_the_start(second):
    strategy, context = second
    moved(context.branches, 1)
    assert strategy.extra_loss(context, {}, None, Step(0, 4)) > 0
    strategy.load_state_dict({})
    assert strategy.state_dict() == {} and strategy.extra_loss(context, {}, None, Step(0, 4)) == 0.0


def test_whole_parameters_are_asked_for():
    assert strategy_of().needs == {"parameters"}


@pytest.mark.parametrize("option", [{"gamma": 1.5}, {"samples": 0}, {"strength": -1.0}, {"mode": "both"}])
def test_an_option_out_of_range_is_refused(option):
    from mllm_keeplora.config import StrategyConfig
    from mllm_keeplora.strategies import build_strategy

    with pytest.raises(UserError, match=f"strategy.{next(iter(option))}"):
        build_strategy(StrategyConfig.model_validate({"name": "ewc", **option}))
