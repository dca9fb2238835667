"""SD-LoRA: directions that stay, magnitudes that train, and one that later ones make up for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters.mixers import load_mixer, save_mixer
from mllm_keeplora.adapters.mixers.magnitudes import Magnitudes
from mllm_keeplora.adapters.stored import Past
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.mixture.sdlora import SDLoRA, SDLoRAOptions
from tests.oracles import sdlora as oracle
from tests.support.keeplora import weights_of
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import HISTORIES, adapt
from tests.unit.conftest import autograd_mean_gradients, encode, logits_of, snapshot

SMALL = {"rank": 3, "alpha": 6.0}
STRICT = {"nu": "one"}
OFFICIAL = {"nu": "one", "compat": "official", "magnitude": 0.8}
SGD = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "args": {"optim": "sgd"}}


def strategy_of(**options):
    return SDLoRA(SDLoRAOptions(**{**SMALL, **options}))


@pytest.fixture(scope="module")
def taught(new_base, tiny_records, tmp_path_factory):
    """Function (base, history, domains, **options) -> strategy and adapters after some domains, and the next context.

    Each set of options is learnt once, with magnitudes that move well away from where they start.
    """
    lessons = {}

    def of(base, history="merged", domains=2, **options):
        options = {"magnitude_rate": 10.0, **options}
        records = {f"domain {i}": tiny_records[("Alpha", "Beta")[i % 2]] for i in range(domains + 1)}
        key = f"{domains} {options}"
        if key not in lessons:
            learner, first, folder = strategy_of(**options), new_base(), tmp_path_factory.mktemp("taught")
            learning = adapt(first)
            for index in range(domains):
                context = context_of(first, learning, records, index)
                learn(learner, context, folder / str(index), epochs=2.0)
            lessons[key] = learning.past, learner.state_dict()
        past, state = lessons[key]
        strategy, adapters = strategy_of(**options), adapt(base, history)
        strategy.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        adapters.restore(past, [])
        return strategy, adapters, context_of(base, adapters, records, domains)

    return of


def branch_of(factors):
    """As the reference takes it."""
    return {
        layer: (factors.A[layer], factors.B[layer], factors.alpha[layer] / factors.ranks[layer]) for layer in factors.A
    }


def products_of(factors):
    branch = branch_of(factors)
    return {layer: oracle.product(branch, layer) for layer in branch}


def explicit_logits(base, deltas, batch):
    """Of a base whose weights are changed by whole matrices."""
    for layer, delta in deltas.items():
        base.model.get_submodule(layer).weight.data += torch.tensor(delta).float()
    return logits_of(base.model, batch)


def live_logits(adapters, batch):
    adapters.look_at(batch)
    return logits_of(adapters.model, batch)


@pytest.mark.parametrize("history", HISTORIES)
def test_nothing_changes_where_the_next_domain_begins(taught, new_base, tiny_records, history):
    base = new_base()
    strategy, adapters, context = taught(base, history)
    assert (strategy.magnitudes - 1).abs().min() > 0.01
    batch = encode(base, tiny_records["Beta"][:4])
    before = logits_of(adapters.model, batch)
    sums = {
        layer: oracle.update(layer, [products_of(each) for each in adapters.past], strategy.magnitudes.tolist())
        for layer in adapters.layers
    }
    assert torch.allclose(explicit_logits(new_base(), sums, batch), before, atol=1e-4)
    open_branch(strategy, context)
    assert torch.allclose(live_logits(adapters, batch), before, atol=1e-4)


@pytest.mark.parametrize(("options", "normalised"), [(STRICT, oracle.direction), (OFFICIAL, oracle.official_direction)])
def test_without_nu_the_next_domain_begins_with_directions(taught, new_base, tiny_records, options, normalised):
    base = new_base()
    strategy, adapters, context = taught(base, **options)
    trained = strategy.magnitudes.tolist()
    batch = encode(base, tiny_records["Beta"][:4])
    last = [{layer: normalised(branch_of(adapters.past[0]), layer) for layer in adapters.layers}]
    answered = {
        layer: oracle.update(layer, [*last, products_of(adapters.past[1])], trained) for layer in adapters.layers
    }
    assert torch.allclose(explicit_logits(new_base(), answered, batch), logits_of(adapters.model, batch), atol=1e-4)
    directions = [{layer: normalised(branch_of(each), layer) for layer in adapters.layers} for each in adapters.past]
    open_branch(strategy, context)
    counts = trained if options is STRICT else [0.8, 0.8]
    opened = {layer: oracle.update(layer, directions, counts) for layer in adapters.layers}
    assert torch.allclose(live_logits(adapters, batch), explicit_logits(new_base(), opened, batch), atol=1e-4)
    scales = adapters.mixer.scales
    for row, layer in enumerate(adapters.layers):
        for part, factors in enumerate(adapters.past):
            size = float(scales[row, part]) * oracle.frobenius(products_of(factors)[layer])
            assert size == pytest.approx(1, abs=1e-4) if options is STRICT else size < 0.999


def test_every_magnitude_and_the_newest_branch_alone_get_a_gradient(taught, new_base, tiny_records):
    base = new_base()
    strategy, adapters, context = taught(base)
    open_branch(strategy, context)
    for name, parameter in adapters.trainable().items():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1)
    samples = [encode(base, [record]) for record in tiny_records["Beta"][:1]]
    adapters.look_at(samples[0])
    adapters.model(**samples[0]).loss.backward()
    reached = {n for n, p in adapters.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(adapters.trainable()) and len(reached) == 33
    gradients = autograd_mean_gradients(adapters.model, weights_of(adapters), samples)
    for part, factors in enumerate([*adapters.past, adapters.read()]):
        products = products_of(factors)
        wanted = sum(float((gradients[layer] * products[layer]).sum()) for layer in products)
        assert float(adapters.mixer.moved.grad[part]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("history", HISTORIES)
def test_earlier_branches_stay_bit_for_bit_while_their_magnitudes_train(taught, new_base, tmp_path, history):
    base = new_base()
    strategy, adapters, context = taught(base, history)
    open_branch(strategy, context)
    stored = [
        ({n: A.clone() for n, A in each.A.items()}, {n: B.clone() for n, B in each.B.items()}) for each in adapters.past
    ]
    before = snapshot(adapters.model)
    fit(strategy, context, tmp_path / "last")
    after = snapshot(adapters.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(adapters.trainable())
    assert (after["base_model.model.branch_mixer.moved"] != before["base_model.model.branch_mixer.moved"]).all()
    for factors, (A, B) in zip(adapters.past, stored, strict=True):
        assert all(torch.equal(factors.A[layer], A[layer]) and torch.equal(factors.B[layer], B[layer]) for layer in A)


def test_magnitudes_have_a_rate_of_their_own(new_base, tiny_records, tmp_path):
    moved, branches = [], []
    for rate in (1.0, 8.0):
        base = new_base()
        adapters, strategy = adapt(base), strategy_of(magnitude_rate=rate)
        records = {"one": tiny_records["Alpha"], "two": tiny_records["Beta"][:4]}
        learn(strategy, context_of(base, adapters, records, 0), tmp_path / f"{rate}a")
        strategy.magnitudes = torch.ones(1)
        context = context_of(base, adapters, records, 1)
        open_branch(strategy, context)
        fit(strategy, context, tmp_path / f"{rate}b", lr=0.01, **SGD)
        moved.append(float(adapters.mixer.magnitudes[0].detach()) - 1)
        branches.append(adapters.read())
    assert moved[1] == pytest.approx(8 * moved[0], rel=0.2) and abs(moved[0]) > 1e-5
    assert branches[0].B.keys() == branches[1].B.keys()


def test_a_small_move_survives_half_precision(base):
    """DeepSpeed casts what is trained; near 1 numbers in bfloat16 are 0.004 apart."""
    mixer = Magnitudes(base.parts.target_layers, 2)
    mixer.moved.data = torch.full((2,), 0.0012, dtype=torch.bfloat16)
    assert torch.allclose(mixer.magnitudes, torch.full((2,), 1.0012), rtol=0, atol=1e-5)


# -- ranks that shrink ------------------------------------------------------------------------------------------------


def test_ranks_shrink_from_their_places_on_and_leave_the_scale(base, tiny_records):
    strategy = strategy_of(later_ranks={1: 2, 3: 1})
    records = {f"domain {i}": tiny_records["Alpha"] for i in range(5)}
    for index, rank in enumerate((3, 2, 2, 1, 1)):
        adapters = adapt(base)
        strategy.load_state_dict({})
        open_branch(strategy, context_of(base, adapters, records, index))
        assert set(adapters.branch.ranks.values()) == {rank}
        assert set(adapters.branch.alpha.values()) == {2.0 * rank}
        adapters.restore([], [])


def test_the_published_ranks_change_at_the_fifth_and_the_ninth_domain():
    options = build_strategy(StrategyConfig(name="sdlora", preset="rr")).options
    assert [options.in_domain(index).rank for index in range(10)] == [10] * 4 + [8] * 4 + [6] * 2


# -- a direction that is dropped ---------------------------------------------------------------------------------------


def inside_the_span(adapters, shares, disturbance=0.0):
    """Set the open branch to a combination of the earlier ones; it has the sum of their ranks."""
    A, B = {}, {}
    for layer in adapters.layers:
        s = adapters.branch.alpha[layer] / adapters.branch.ranks[layer]
        scaled = [
            share * each.alpha[layer] / each.ranks[layer] / s for share, each in zip(shares, adapters.past, strict=True)
        ]
        A[layer] = torch.cat([each.A[layer] for each in adapters.past])
        B[layer] = torch.cat([c * each.B[layer] for c, each in zip(scaled, adapters.past, strict=True)], dim=1)
        noise = torch.randn(B[layer].shape, generator=torch.Generator().manual_seed(3))
        B[layer] = B[layer] + disturbance * B[layer].norm() / noise.norm() * noise
    return type(adapters.past[0])(A, B, adapters.branch.alpha)


def absorbed(taught, base, disturbance=0.0, **options):
    """Two domains learnt, a third set inside their span; gives strategy, adapters, context, its factors."""
    strategy, adapters, context = taught(base, later_ranks={2: 6}, **options)
    open_branch(strategy, context)
    factors = inside_the_span(adapters, (0.6, -1.7), disturbance)
    adapters.load(factors, {})
    adapters.mixer.start.data[-1] = 1.3
    return strategy, adapters, context, factors


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), STRICT])  # one rule for both
def test_a_direction_inside_the_span_of_earlier_ones_is_dropped_and_the_sum_stays(
    taught, new_base, tiny_records, options
):
    base = new_base()
    kd = {"kd_threshold": 9e-4, **options}
    strategy, adapters, context, factors = absorbed(taught, base, **kd)
    if options:  # earlier branches run as directions, a norm for each layer: no combination of them is the same
        strategy.options = strategy.options.model_copy(update={"kd_threshold": 1.0})
    batch = encode(base, tiny_records["Beta"][:4])
    before, live = live_logits(adapters, batch), adapters.mixer
    live_scales, live_magnitudes = live.scales.double().numpy(), live.magnitudes.detach().clone()
    strategy.after_domain(context)
    branches = [*adapters.past, factors]
    scaled = [
        {layer: live_scales[row, part] * products_of(each)[layer] for row, layer in enumerate(adapters.layers)}
        for part, each in enumerate(branches)
    ]
    coefficients, left = oracle.fit(scaled[:-1], scaled[-1])
    assert context.facts["unexplained"] == pytest.approx(left, abs=1e-6) and context.facts["dropped"] == [2]
    wanted = live_magnitudes[:2].double().numpy() + 1.3 * coefficients
    assert np.allclose(strategy.magnitudes[:2], wanted, atol=1e-4) and strategy.magnitudes[2] == 0
    past = context.answering.summed(Past(branches))
    assert all(weight == 0 for weight in past.factors[2].weight.values())
    adapters.restore(past.factors, [])
    if not options:
        assert np.allclose(coefficients, (0.6, -1.7), atol=1e-5) and left < 1e-9
        assert torch.allclose(logits_of(adapters.model, batch), before, atol=1e-4)


def test_a_direction_that_is_too_far_from_the_span_is_kept(taught, new_base):
    base = new_base()
    strategy, adapters, context, _ = absorbed(taught, base, 0.05, kd_threshold=9e-4)
    magnitudes = adapters.mixer.magnitudes.detach().clone()
    strategy.after_domain(context)
    assert 9e-4 < context.facts["unexplained"] < 0.01 and context.facts["dropped"] == []
    assert torch.equal(strategy.magnitudes, magnitudes) and strategy.in_use.all()


def test_a_dropped_direction_stays_out_of_later_domains(taught, new_base, tiny_records):
    base = new_base()
    strategy, adapters, context = taught(base, domains=3, kd_threshold=1.0)
    assert strategy.in_use.tolist() == [True, False, False]
    open_branch(strategy, context)
    batch = encode(base, tiny_records["Alpha"][:4])
    before = live_logits(adapters, batch)
    adapters.mixer.start.data[1:3] = 5.0
    assert torch.equal(live_logits(adapters, batch), before)
    adapters.look_at(batch)
    adapters.model(**batch).loss.backward()
    gradient = adapters.mixer.moved.grad
    assert gradient[0] != 0 and gradient[1:3].tolist() == [0, 0]


def test_the_first_domain_is_never_dropped(taught, base):
    strategy, adapters, _ = taught(base, domains=1, kd_threshold=1.0)
    assert strategy.in_use.tolist() == [True] and any(B.any() for B in adapters.past[0].B.values())


# -- state, files, options --------------------------------------------------------------------------------------------


def test_a_state_that_was_taken_back_opens_the_same_branch(taught, new_base):
    base = new_base()
    strategy, adapters, context = taught(base, **STRICT)
    again = strategy_of(magnitude_rate=10.0, **STRICT)
    again.load_state_dict(strategy.state_dict())
    opened = []
    for each in (strategy, again):
        past = adapters.past
        context.rng.manual_seed(0)
        open_branch(each, context)
        opened.append(adapters.mixer)
        adapters.restore(past, [])
    assert torch.equal(opened[0].magnitudes, opened[1].magnitudes) and torch.equal(opened[0].scales, opened[1].scales)
    again.load_state_dict({})
    assert len(again.magnitudes) == 0 == len(again.in_use)


def test_the_final_mixer_is_the_same_if_the_end_of_a_domain_is_done_twice(taught, new_base):
    base = new_base()
    strategy, _, context, _ = absorbed(taught, base, kd_threshold=9e-4)
    strategy.after_domain(context)
    first, state = context.answering.stored(), strategy.state_dict()
    strategy.after_domain(context)
    facts, tensors = context.answering.stored()
    assert facts == first[0] and all(torch.equal(tensors[name], first[1][name]) for name in tensors)
    assert all(torch.equal(strategy.state_dict()[name], state[name]) for name in state)


def test_a_mixer_of_magnitudes_is_read_back_as_it_was_written(taught, new_base, tmp_path):
    strategy, adapters, context = taught(new_base(), **STRICT)
    open_branch(strategy, context)
    save_mixer(tmp_path / "mixer.safetensors", adapters.mixer)
    read = load_mixer(tmp_path / "mixer.safetensors")
    assert read.settings() == adapters.mixer.settings() and read.rate == 10.0
    assert torch.equal(read.magnitudes, adapters.mixer.magnitudes) and torch.equal(read.scales, adapters.mixer.scales)
    for layer in adapters.layers:
        assert torch.equal(read.of(layer, torch.zeros(1)), adapters.mixer.of(layer, torch.zeros(1)))
