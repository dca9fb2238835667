"""Merged: what answers after two domains, against the slow reference, rule by rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import dropped
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.merged import Merged, MergedOptions
from tests.oracles import merge as oracle
from tests.support.strategies import context_of
from tests.unit.adapters.conftest import adapt
from tests.unit.conftest import captured_tokens, encode


def strategy_of(**options) -> Merged:
    return Merged(MergedOptions(rank=2, alpha=6.0, samples=12, **options))


@pytest.fixture
def merged(base, tiny_records):
    """Function (domains=2, **options) -> the branches of so many domains, the last strategy and its last context."""

    def of(domains=2, **options):
        adapters, generator = adapt(base), torch.Generator().manual_seed(0)
        branches, state = [], {}
        for index in range(domains):
            strategy = strategy_of(**options)
            strategy.load_state_dict(state)
            context = context_of(base, adapters, tiny_records, index, trained=lambda place: (branches[place], {}))
            adapters.restore([], [])
            start = strategy.before_domain(context)
            adapters.open(start)
            B = {layer: torch.randn(context.layers.d_out(layer), 2, generator=generator) for layer in start.A}
            branches.append(Factors(start.A, {layer: 0.1 * each for layer, each in B.items()}, start.alpha))
            adapters.load(branches[-1], {})
            strategy.after_domain(context)
            state = strategy.state_dict()
        return branches, strategy, context

    return of


def products(branches, layer) -> list[np.ndarray]:
    return [each.delta(layer).double().numpy() for each in branches]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_sum_is_kept_exactly(merged, scale):
    branches, _, context = merged(rule="sum", scale=scale)
    assert context.replacement.instead_of == "all" and context.replacement.full is None
    for layer in context.layers.names:
        wanted = oracle.summed(products(branches, layer), scale or 0.5)
        assert np.allclose(context.replacement.factors.delta(layer), wanted, atol=1e-5)
        assert context.replacement.factors.ranks[layer] == 4


def test_ties_is_kept_exactly_at_full_rank_and_nearest_below_it(merged):
    branches, _, whole = merged(rule="ties", stored_rank=1000, density=0.4)
    assert whole.facts["lost"]["max"] < 1e-9
    _, _, cut = merged(rule="ties", density=0.4)
    assert 0.1 < cut.facts["lost"]["mean"] <= cut.facts["lost"]["max"] < 1
    for layer in whole.layers.names[:4]:
        wanted = oracle.ties(products(branches, layer), 0.4)
        assert np.allclose(whole.replacement.factors.delta(layer), wanted, atol=1e-5)
        nearest, _ = oracle.nearest(wanted, 4)
        assert np.allclose(cut.replacement.factors.delta(layer), nearest, atol=1e-4)


@pytest.mark.parametrize("rule", ["dare", "dare_ties"])
def test_masks_depend_on_seed_domain_and_layer_alone(merged, rule):
    branches, strategy, context = merged(rule=rule, stored_rank=1000, drop=0.5, seed=3)
    for layer in reversed(context.layers.names[:4]):
        masks = [
            dropped(torch.ones(each.delta(layer).shape), 0.5, strategy._masks(layer, index)) != 0
            for index, each in enumerate(branches)
        ]
        assert not torch.equal(*masks)
        parts = [oracle.dropped(d, m.numpy(), 0.5) for d, m in zip(products(branches, layer), masks, strict=True)]
        wanted = oracle.summed(parts, 0.5) if rule == "dare" else oracle.elected(parts)
        assert np.allclose(context.replacement.factors.delta(layer), wanted, atol=1e-5)
    assert strategy_of(rule=rule, seed=4)._masks(layer, 0).initial_seed() != strategy._masks(layer, 0).initial_seed()


def test_regmean_is_the_fit_to_what_each_branch_answers_on_its_own_inputs(merged, base, tiny_records):
    branches, strategy, context = merged(rule="regmean")
    adapters, inputs = context.branches, []
    layers = {layer: adapters.base.get_submodule(layer) for layer in context.layers.names}
    for factors, records in zip(branches, tiny_records.values(), strict=False):
        adapters.load(factors, {})
        batches = [encode(base, [record]) for record in records]
        inputs.append(captured_tokens(adapters.model, layers, batches))
    for layer in context.layers.names:
        rows = [np.asarray(each[layer], dtype=np.float64) for each in inputs]
        wanted = oracle.regmean(products(branches, layer), rows, 0.9)
        found = context.replacement.factors.delta(layer).numpy()
        assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted), layer
        assert context.replacement.factors.ranks[layer] == 4
    moments = [key for key in strategy.state_dict() if key.startswith("moments|")]
    assert len(moments) < len(context.layers.names)  # layers with one input share them


def test_after_the_first_domain_the_branch_itself_answers_unless_it_is_scaled_or_trimmed(merged):
    for rule in ("sum", "regmean"):
        [branch], _, context = merged(domains=1, rule=rule)
        for layer in context.layers.names:
            found, wanted = context.replacement.factors.delta(layer), branch.delta(layer)
            assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_parameters_trained_in_full_merge_by_the_same_rule():
    deltas = [torch.randn(3, 4), torch.randn(3, 4)]
    found = strategy_of(rule="ties", density=0.5)._rule("p", deltas)
    assert np.allclose(found, oracle.ties([each.double().numpy() for each in deltas], 0.5), atol=1e-6)
    for rule in ("sum", "regmean"):
        assert torch.allclose(strategy_of(rule=rule)._rule("p", deltas), sum(deltas) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "mean"}, "rule"),
        (
            {"rule": "regmean", "scale": 0.3},
            r"^strategy: scale is 0\.3, but has no meaning with rule regmean, .* of its own \(config\)$",
        ),
        ({"drop": 1.0}, "drop"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_strategy(StrategyConfig(name="merged", **options))


def test_presets_have_the_published_numbers():
    def options(preset):
        return build_strategy(StrategyConfig(name="merged", preset=preset)).options

    assert options("task-arithmetic").scale == 0.3 and options("regmean").off_diagonal == 0.9
    assert (options("ties").density, options("dare").drop) == (0.2, 0.9)
