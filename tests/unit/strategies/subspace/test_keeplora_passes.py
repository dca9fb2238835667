"""Which records, statistics and decompositions KeepLoRA's data passes use under its options."""

from __future__ import annotations

import pytest

from mllm_keeplora.strategies.subspace.keeplora import KeepLoRAOptions
from tests.oracles import subspace
from tests.support.keeplora import ENERGY_FEATURES, RANK, modules_of, weights_of
from tests.support.strategies import open_branch
from tests.support.variants import assert_bases, begin, disturb, opened
from tests.unit.conftest import autograd_mean_gradients, captured_tokens, encode


@pytest.fixture
def alpha_records(tiny_records):
    return tiny_records["Alpha"]


@pytest.mark.parametrize(
    ("samples", "spacing", "picked"),
    [
        (1, "even", [0]), (5, "even", [0, 2, 4, 7, 9]), (0.25, "even", [0, 4, 8]), (99, "even", range(12)),
        (5, "ends", [0, 2, 5, 8, 11]), (0.24, "ends", [0, 11]), (0.01, "ends", [0]), (99, "ends", range(12)),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_spaced_records_by_count_or_share(new_base, alpha_records, samples, spacing, picked):
    """Option D5: twelve records; `grad_samples` says how many, the samples of features notwithstanding."""
    settings = {"grad_samples": samples, "feature_samples": 2, "sample_spacing": spacing}
    domain = begin(new_base(), alpha_records, **settings)
    chosen = [encode(domain.base, [alpha_records[number]]) for number in picked]
    gradients = autograd_mean_gradients(domain.adapters.model, weights_of(domain.adapters), chosen)
    open_branch(domain.strategy, domain.context)
    for layer, gradient in gradients.items():
        wanted = subspace.initial_a(gradient, domain.kept_before[layer], RANK)
        assert subspace.projector_difference(domain.adapters.branch.A[layer].numpy().T, wanted.T) < 1e-3


@pytest.mark.parametrize(
    ("samples", "spacing", "picked"), [(1, "even", [0]), (0.25, "even", [0, 4, 8]), (0.25, "ends", [0, 5, 11])]
)
def test_features_are_those_of_spaced_records_by_count_or_share(new_base, alpha_records, samples, spacing, picked):
    settings = {"grad_samples": 2, "feature_samples": samples, "sample_spacing": spacing}
    domain = opened(new_base(), alpha_records, **settings)
    disturb(domain.adapters)
    chosen = [encode(domain.base, [alpha_records[number]]) for number in picked]
    features = captured_tokens(domain.adapters.model, modules_of(domain.base), chosen)
    kept = domain.kept_before
    wanted = {layer: subspace.grow(kept[layer], features[layer], ENERGY_FEATURES) for layer in kept}
    assert_bases(domain.finish(), wanted, 1e-3)


def test_settings_of_the_decomposition_reach_it(new_base, alpha_records):
    """Option D6: without oversampling and iterations A is visibly not the exact one, with the default it is."""
    exact, bare, default = (
        opened(new_base(), alpha_records, **settings).adapters.branch.A
        for settings in (
            {},
            {"a_init_svd": "randomized", "oversample": 0, "power_iters": 0},
            {"a_init_svd": "randomized", "oversample": 24},
        )
    )
    apart = {
        name: [subspace.projector_difference(found[layer].T.numpy(), exact[layer].T.numpy()) for layer in exact]
        for name, found in (("bare", bare), ("default", default))
    }
    assert min(apart["bare"]) > 0.1 and max(apart["default"]) < 0.05


def test_plans_and_decomposition_carry_what_the_options_say():
    options = KeepLoRAOptions(
        rank=4,
        gradient_statistic="sketch",
        sketch_width=24,
        feature_statistic="auto",
        feature_sketch_size=77,
        feature_tokens={"image": 9},
        normalise_tokens=True,
        statistics_memory_gb=1.5,
        a_init_svd="randomized",
        oversample=3,
        power_iters=1,
    )
    gradient, features, randomized = options.gradient_plan(), options.feature_plan(), options.randomized()
    assert (gradient.statistic, gradient.width, gradient.memory_gb) == ("sketch", 24, 1.5)
    assert (features.statistic, features.size, features.memory_gb) == ("auto", 77, 1.5)
    assert features.tokens == {"image": 9} and features.normalise
    assert (randomized.oversample, randomized.power_iterations) == (3, 1)
    plain = KeepLoRAOptions()
    assert plain.feature_plan().tokens is None and not plain.feature_plan().normalise
    assert KeepLoRAOptions(a_init_svd="exact").randomized() is None


def test_b_from_the_gradient_needs_the_gradient_itself():
    """Equation (5a) has no counterpart in a sketch."""
    for statistic in ("sketch", "auto"):
        options = KeepLoRAOptions(gradient_statistic=statistic, b_init="gradient", statistics_memory_gb=1e-9)
        assert options.gradient_plan().exact({"layer": (4096, 4096)})
