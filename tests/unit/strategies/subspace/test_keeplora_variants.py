"""How a KeepLoRA domain starts and trains under every option: A, B, layer scale, exhaustion; against the oracle.

Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import Basis
from tests.oracles import subspace
from tests.support.keeplora import ALPHA, RANK, SAMPLES, TOLERANCE, columns_of, fit, modules_of
from tests.support.strategies import open_branch
from tests.support.variants import NUM_LAYERS, begin, disturb, opened, options_of
from tests.unit.conftest import encode, logits_of, snapshot


@pytest.fixture
def alpha_records(tiny_records):
    return tiny_records["Alpha"]


def largest_difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


def assert_valid(domain, layer):
    """[1, 2]"""
    A = domain.adapters.branch.A[layer].double().numpy()
    assert np.linalg.norm(A @ A.T - np.eye(len(A)), 2) < TOLERANCE
    assert np.abs(A @ domain.kept_before[layer]).max(initial=0.0) < TOLERANCE


def mass_and_captured(domain, gradient, layer):
    """[14]: top singular mass of the residual gradient, and how much of the gradient A captures."""
    residual = subspace.residual_gradient(gradient, domain.kept_before[layer])
    mass = (np.linalg.svd(residual, compute_uv=False)[:RANK] ** 2).sum()
    return mass, subspace.energy(gradient @ domain.adapters.branch.A[layer].double().numpy().T)


# -- layer scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layer_scale": "none"}, (1.0, 1.0)),
        ({"layer_scale": "linear", "layer_scale_gamma": 0.2}, (0.2, 1.0)),
        ({"layer_scale": "reversed", "layer_scale_gamma": 0.3}, (1.0, 0.3)),
        ({"layer_scale": 0.6}, (0.6, 0.6)),
        ({"layer_scale": [0.9, 0.4]}, (0.9, 0.4)),
    ],
    ids=str,
)
def test_a_layers_update_is_scaled_in_training_and_merge_alike(new_base, alpha_records, settings, expected):
    """[11], equation (11)"""
    domain, seen = opened(base := new_base(), alpha_records, **settings), set()
    disturb(domain.adapters)
    factors, batch = domain.adapters.read(), encode(base, alpha_records[:3])
    for layer in base.parts.target_layers:
        depth = base.parts.depth(layer)
        scale = 1.0 if depth is None else expected[depth]
        seen.add(depth)
        assert domain.adapters.branch.alpha[layer] / RANK == pytest.approx(ALPHA / RANK * scale)
        wanted = subspace.delta_weight(factors.A[layer].numpy(), factors.B[layer].numpy(), ALPHA / RANK * scale)
        assert np.abs(factors.delta(layer).numpy() - wanted).max() < 1e-6
    assert seen == {None, 0, 1}
    adapted = logits_of(domain.adapters.model, batch)
    domain.adapters.restore([factors], [])
    assert largest_difference(logits_of(domain.adapters.model, batch), adapted) < TOLERANCE


def test_a_scale_changes_neither_directions_nor_bases(new_base, alpha_records):
    """Section 4"""
    plain, scaled = (opened(new_base(), alpha_records, layer_scale=each) for each in ("none", "linear"))
    for layer in plain.adapters.layers:
        assert torch.equal(plain.adapters.branch.A[layer], scaled.adapters.branch.A[layer])
        assert np.array_equal(plain.kept_before[layer], scaled.kept_before[layer])


def test_gamma_one_reproduces_a_run_without_scale_bit_for_bit(new_base, alpha_records, tmp_path):
    """[15]"""
    runs = []
    for layer_scale in ("none", "linear"):
        domain = opened(new_base(), alpha_records, layer_scale=layer_scale, layer_scale_gamma=1.0)
        torch.manual_seed(0)
        fit(domain.strategy, domain.context, tmp_path / layer_scale, epochs=0.5)
        runs.append((domain.adapters.read(), domain.finish()))
    (plain, kept), (one, kept_one) = runs
    for layer in plain.A:
        assert torch.equal(one.A[layer], plain.A[layer]) and torch.equal(one.B[layer], plain.B[layer])
        assert one.alpha[layer] == plain.alpha[layer] and np.array_equal(kept_one[layer], kept[layer])
    assert any(bool(B.any()) for B in plain.B.values())


def test_a_list_of_scales_that_does_not_fit_the_model_is_refused(base, alpha_records):
    with pytest.raises(UserError, match="layer_scale"):
        opened(base, alpha_records, layer_scale=[0.2, 0.6, 1.0])


# -- where A comes from ----------------------------------------------------------------------------------------------


def test_random_directions_of_the_complement_are_orthonormal_and_outside_the_basis(new_base, alpha_records):
    """[1, 2], and no better than chance"""
    domain = opened(new_base(), alpha_records, a_init="random_complement")
    gradient, better = opened(new_base(), alpha_records), 0
    for layer in domain.adapters.layers:
        assert domain.adapters.branch.A[layer].shape == gradient.adapters.branch.A[layer].shape
        assert_valid(domain, layer)
        found, other = domain.adapters.branch.A[layer].numpy(), gradient.adapters.branch.A[layer].numpy()
        better += subspace.projector_difference(found.T, other.T) > 0.5
    assert better == NUM_LAYERS


def test_random_directions_need_not_avoid_the_basis(base, alpha_records):
    domain = opened(base, alpha_records, a_init="random")
    leaks = []
    for layer in domain.adapters.layers:
        A = domain.adapters.branch.A[layer].double().numpy()
        assert len(A) == RANK and np.linalg.svd(A, compute_uv=False)[-1] > 1e-2
        leaks.append(np.linalg.norm(A @ domain.kept_before[layer], 2) / np.linalg.norm(A, 2))
    assert min(leaks) > 0.1


@pytest.mark.parametrize("a_init", ["random", "random_complement"])
def test_random_directions_depend_on_the_seed_of_the_domain_alone(new_base, alpha_records, a_init):
    """[19]"""
    starts = []
    for seed in (1, 1, 2):
        torch.rand(seed)
        starts.append(opened(new_base(), alpha_records, a_init=a_init, seed=seed).adapters.branch.A)
    for layer in starts[0]:
        assert torch.equal(starts[0][layer], starts[1][layer])
        assert not torch.allclose(starts[0][layer], starts[2][layer], atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"oversample": 0, "power_iters": 2}, {"oversample": 8}], ids=str)
def test_randomised_directions_are_valid_deterministic_and_nearly_optimal(new_base, alpha_records, settings):
    """[1, 2, 14, 19]"""
    domain, again = (opened(new_base(), alpha_records, a_init_svd="randomized", **settings) for _ in range(2))
    gradients = begin(new_base(), alpha_records).gradients()
    for layer, gradient in gradients.items():
        assert_valid(domain, layer)
        assert torch.equal(domain.adapters.branch.A[layer], again.adapters.branch.A[layer])
        mass, captured = mass_and_captured(domain, gradient, layer)
        assert (0.9 if settings.get("oversample") == 0 else 0.99) * mass < captured < (1 + 1e-4) * mass


def test_directions_from_a_sketch_are_those_of_the_sketched_gradient(new_base, alpha_records):
    """Section 11.2, item 7: the projection commutes with the sketch; along random directions it 4 r wide."""
    random = options_of(gradient_statistic="sketch", sketch_directions="random").gradient_plan()
    assert random.width >= 4 * RANK and not random.following
    assert options_of(gradient_statistic="sketch").gradient_plan().following
    settings = {"gradient_statistic": "sketch", "sketch_width": 12}
    plan, domain = options_of(**settings).gradient_plan(), begin(new_base(), alpha_records, **settings)
    assert plan.width == 12
    sketches = domain.context.passes.gradients(SAMPLES, plan)
    open_branch(domain.strategy, domain.context)
    for layer in domain.adapters.layers:
        assert_valid(domain, layer)
        sketch = sketches[layer].sketch.mT.double().numpy()
        expected = subspace.initial_a(sketch, domain.kept_before[layer], RANK)
        found = domain.adapters.branch.A[layer].numpy()
        assert subspace.projector_difference(found.T, expected.T) < 1e-3


# -- where B starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"a_init_svd": "randomized"}, {"gradient_statistic": "sketch", "sketch_width": 8}], ids=str
)
def test_b_starts_at_the_captured_residual_gradient(new_base, alpha_records, settings):
    """Equation (5a)"""
    gradients = begin(new_base(), alpha_records).gradients()
    domain = opened(new_base(), alpha_records, b_init="gradient", **settings)
    branch = domain.adapters.branch
    assert branch.B.keys() == branch.A.keys() and len(branch.B) == NUM_LAYERS
    for layer, gradient in gradients.items():
        assert_valid(domain, layer)
        expected = subspace.initial_b_gradient(gradient, domain.kept_before[layer], branch.A[layer].numpy())
        assert np.linalg.norm(branch.B[layer].numpy() - expected) < 1e-3 * np.linalg.norm(expected)
        running = domain.adapters.trainable()[f"base_model.model.{layer}.lora_B.domain.weight"]
        assert torch.equal(running, branch.B[layer])


@pytest.mark.parametrize("b_init", ["zero", "gradient"])
@pytest.mark.parametrize(
    ("a_init", "history"),
    [("gradient", "merged"), ("gradient", "factors"), ("random_complement", "factors"), ("random", "merged")],
)
def test_the_function_is_unchanged_at_opening_whatever_a_and_b(new_base, alpha_records, history, b_init, a_init):
    """[10]"""
    base = new_base()
    batch = encode(base, alpha_records[:3])
    before = logits_of(base.model, batch)
    domain = opened(base, alpha_records, history=history, b_init=b_init, a_init=a_init, alpha=64.0)
    assert (logits_of(domain.adapters.model, batch) - before).abs().max() < TOLERANCE
    B = domain.adapters.trainable().values()
    assert len(B) == NUM_LAYERS and all(bool(each.any()) == (b_init == "gradient") for each in B)


@pytest.mark.parametrize(
    ("history", "b_init", "freeze_a"),
    [
        ("merged", "zero", False),
        ("merged", "gradient", True),
        ("factors", "gradient", True),
        ("merged", "gradient", False),
        ("factors", "gradient", False),
    ],
)
def test_a_trained_domain_is_stored_as_the_change_that_it_made(
    new_base, alpha_records, tmp_path, history, b_init, freeze_a
):
    """[11, 12], with g_l != 1: what is restored computes what ran, and only the stated parts were trained."""
    base, settings = new_base(), {"b_init": b_init, "freeze_a": freeze_a, "layer_scale": "linear"}
    domain = opened(base, alpha_records, history=history, **settings)
    adapters, batch, kept = domain.adapters, encode(base, alpha_records[:3]), domain.kept_before
    started, before = snapshot(adapters.model), logits_of(adapters.model, batch)
    fit(domain.strategy, domain.context, tmp_path, epochs=1)
    trained, adapted = snapshot(adapters.model), logits_of(adapters.model, batch)
    assert largest_difference(adapted, before) > 1e-2

    parts = ("B",) if freeze_a else ("A", "B")
    names = {f"base_model.model.{layer}.lora_{part}.domain.weight" for layer in adapters.layers for part in parts}
    assert {name for name in started if not torch.equal(started[name], trained[name])} == names

    factors, leaks = adapters.read(), []
    for layer in adapters.layers:
        leaks.append(subspace.leak(factors.delta(layer).numpy(), kept[layer]))
        prefix = f"base_model.model.{layer}.lora"
        if freeze_a:
            moved = trained[f"{prefix}_B.domain.weight"] - started[f"{prefix}_B.domain.weight"]
            assert torch.allclose(factors.B[layer], moved, atol=1e-6)
            assert torch.equal(factors.A[layer], adapters.branch.A[layer])
    assert max(leaks) < TOLERANCE if freeze_a else min(leaks) > 100 * TOLERANCE, (
        "only a frozen A keeps out of the basis"
    )
    adapters.restore([factors], [])
    assert largest_difference(logits_of(adapters.model, batch), adapted) < TOLERANCE


# -- exhaustion ------------------------------------------------------------------------------------------------------

FREE = (0, 1, RANK - 1, RANK, 10)  # of the first layers; the others have plenty


def nearly_full(base):
    """Kept bases with few free directions, and how many by layer."""
    kept, free, generator = {}, {}, torch.Generator().manual_seed(0)
    for number, (layer, module) in enumerate(modules_of(base).items()):
        free[layer] = FREE[number] if number < len(FREE) else 12
        columns = torch.linalg.qr(torch.randn(module.in_features, module.in_features, generator=generator))[0]
        kept[layer] = Basis.from_columns(columns[:, : module.in_features - free[layer]])
    return kept, free


@pytest.mark.parametrize("on_exhaustion", ["reduce_rank", "freeze_module"])
@pytest.mark.parametrize(
    ("a_init", "b_init"), [("gradient", "zero"), ("random_complement", "zero"), ("gradient", "gradient")]
)
def test_a_layer_that_runs_out_gets_fewer_directions_or_none(base, alpha_records, a_init, on_exhaustion, b_init):
    """[20], option D15"""
    kept, free = nearly_full(base)
    settings = {"a_init": a_init, "on_exhaustion": on_exhaustion, "b_init": b_init}
    domain = opened(base, alpha_records, kept=kept, **settings)
    ranks = domain.adapters.branch.ranks
    least = 1 if on_exhaustion == "reduce_rank" else RANK
    assert ranks == {layer: min(room, RANK) for layer, room in free.items() if room >= least}
    assert len(ranks) == (15 if on_exhaustion == "reduce_rank" else 13)
    for layer, rank in ranks.items():
        assert_valid(domain, layer)
        assert domain.adapters.branch.alpha[layer] / rank == pytest.approx(ALPHA / RANK)
    disturb(domain.adapters)
    assert domain.adapters.read().A.keys() == ranks.keys()
    before = columns_of(kept)
    for layer, columns in domain.finish().items():
        assert columns.shape[1] <= columns.shape[0]
        assert np.array_equal(columns[:, : before[layer].shape[1]], before[layer])


@pytest.mark.parametrize("a_init", ["gradient", "random_complement"])
def test_an_exhausted_layer_stops_the_run_where_that_is_asked_for(base, alpha_records, a_init):
    """[20], option D15"""
    kept, _ = nearly_full(base)
    with pytest.raises(UserError, match=base.parts.target_layers[0].replace(".", r"\.")):
        opened(base, alpha_records, kept=kept, a_init=a_init, on_exhaustion="error")


@pytest.mark.parametrize(
    ("captured", "told"), [(0.0, "give no target layer a gradient"), (1.0, "no target layer has a direction left")]
)
def test_a_domain_without_gradient_is_not_told_to_free_directions(base, alpha_records, captured, told):
    domain = begin(base, alpha_records)
    facts = {layer: {"rank": 0, "kept": 0, "protected": captured, "captured": 0.0, "discarded": 0.0} for layer in "ab"}
    with pytest.raises(UserError, match=told) as error:
        domain.strategy._warn_of_exhaustion(domain.context, facts)
    assert ("energy_features" in str(error.value)) == (captured > 0)


def test_a_space_with_room_for_the_rank_is_not_exhausted(new_base, alpha_records):
    """[20], option D15: exactly r free directions are enough."""
    base = new_base()
    kept, free = nearly_full(base)
    for layer, room in free.items():
        if room < RANK:
            kept[layer] = Basis.from_columns(kept[layer].columns[:, : kept[layer].d_in - RANK])
    domain = opened(base, alpha_records, kept=kept, on_exhaustion="error")
    assert set(domain.adapters.branch.ranks.values()) == {RANK} and len(domain.adapters.branch.A) == NUM_LAYERS
