"""Sanity of the numpy oracles: the invariants of the method on small random matrices, worked metric examples."""

from itertools import pairwise

import numpy as np
import pytest

from tests.oracles import keeplora_run, subspace, training
from tests.oracles import score_matrix as metrics

SEEDS = (0, 1, 2)
TOL = 1e-10
BASE = [20, 30, 40]
MATRIX = [[70, 32, 38], [74, 60, 42], [65, 54, 90]]
ALONE = [70, 66, 93]
UCIT_LORA = [
    [90.97, None, None, None, None, None],
    [90.38, 92.60, None, None, None, None],
    [73.90, 86.33, 59.54, None, None, None],
    [75.67, 68.77, 47.34, 53.30, None, None],
    [75.10, 74.53, 46.73, 52.30, 69.73, None],
    [65.77, 71.27, 45.05, 51.20, 49.60, 57.47],
]


def random_problem(seed, d_in=12, d_out=9, n=30, eps_w=0.6):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((d_out, d_in)) * 0.8 ** np.arange(d_in)
    gradient = rng.standard_normal((d_out, d_in))
    features = rng.standard_normal((n, 4)) @ rng.standard_normal((4, d_in)) + 0.05 * rng.standard_normal((n, d_in))
    return rng, weight, gradient, features, subspace.principal_subspace(weight, eps_w)


@pytest.mark.parametrize(
    ("c0", "eps", "expected"), [(0, 0.5, 1), (0, 0.7, 2), (0, 1.0, 3), (0.5, 0.5, 0), (0, 0, 0), (0.25, 0.95, 2)]
)
def test_select_counts_the_fewest_directions_that_reach_the_threshold(c0, eps, expected):
    assert subspace.select([4.0, 2.0, 2.0], 24.0, c0, eps) == expected  # shares 2/3, 1/6, 1/6


def test_legacy_rank_is_one_less_and_at_least_one():
    for eps in (0.1, 0.6, 0.7, 0.9):
        reach = subspace.select([4.0, 2.0, 2.0], 24.0, 0.0, eps)
        assert subspace.select_below_legacy([4.0, 2.0, 2.0], 24.0, eps) == max(reach - 1, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_principal_subspace_is_orthonormal_input_sided_and_minimal(seed):
    _, weight, _, _, basis = random_problem(seed)
    assert basis.shape[0] == weight.shape[1]
    assert 1 <= basis.shape[1] <= min(weight.shape)
    assert np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=TOL)
    assert subspace.coverage(basis, weight) >= 0.6 > subspace.coverage(basis[:, :-1], weight)
    by_gram = np.linalg.eigh(weight.T @ weight)[1][:, ::-1][:, : basis.shape[1]]
    assert subspace.projector_difference(basis, by_gram) < TOL


@pytest.mark.parametrize("seed", SEEDS)
def test_a_is_orthonormal_outside_the_basis_and_captures_most(seed):
    rng, _, gradient, _, basis = random_problem(seed)
    a = subspace.initial_a(gradient, basis, 3)
    assert a.shape == (3, 12)
    assert np.allclose(a @ a.T, np.eye(3), atol=TOL)
    assert np.abs(a @ basis).max() < TOL
    residual = subspace.residual_gradient(gradient, basis)
    assert np.abs(residual @ basis).max() < TOL
    top = np.linalg.svd(residual, compute_uv=False)[:3]
    captured = np.linalg.norm(gradient @ a.T)
    assert np.isclose(captured, np.sqrt(np.sum(top**2)))
    for _ in range(20):
        other = subspace.gram_schmidt(rng.standard_normal((12, 3)), basis)
        assert np.linalg.norm(gradient @ other) <= captured
    assert np.isclose(sum(subspace.capture_split(gradient, basis, a)), 1.0)
    start = subspace.initial_b_gradient(gradient, basis, a)
    assert np.allclose(np.linalg.norm(start, axis=0), top)


@pytest.mark.parametrize(("num_free", "expected"), [(5, 5), (4, 4), (1, 1), (0, 0)])
def test_a_never_returns_directions_inside_the_basis_when_space_runs_out(num_free, expected):
    rng, _, gradient, _, _ = random_problem(0)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0][:, : 12 - num_free]
    a = subspace.initial_a(gradient, basis, 6)
    assert a.shape == (expected, 12)
    assert expected == 0 or np.abs(a @ basis).max() < TOL


def test_a_of_a_low_rank_gradient_has_only_its_directions():
    rng, _, _, _, basis = random_problem(1)
    gradient = rng.standard_normal((9, 2)) @ rng.standard_normal((2, 12))
    assert subspace.initial_a(gradient, basis, 5).shape == (2, 12)
    assert subspace.initial_a(gradient @ basis @ basis.T, basis, 5).shape == (0, 12)
    assert subspace.initial_a(np.zeros((9, 12)), basis, 5).shape == (0, 12)


@pytest.mark.parametrize("seed", SEEDS)
def test_growth_covers_minimally_keeps_old_columns_and_is_idempotent(seed):
    _, _, _, features, basis = random_problem(seed)
    grown = subspace.grow(basis, features, 0.99)
    k = basis.shape[1]
    assert np.array_equal(grown[:, :k], basis)
    assert k < grown.shape[1] <= 12
    assert np.allclose(grown.T @ grown, np.eye(grown.shape[1]), atol=TOL)
    assert subspace.coverage(grown, features) >= 0.99 > subspace.coverage(grown[:, :-1], features)
    assert np.isclose(subspace.covered_share(features, basis), subspace.coverage(basis, features))
    assert np.array_equal(subspace.grow(grown, features, 0.99), grown)
    assert subspace.grow(basis, features, 0.99, cap=k + 1).shape[1] == k + 1
    assert np.array_equal(subspace.grow(basis, features, 0.99, cap=1), basis)
    assert np.array_equal(subspace.grow(basis, features @ basis @ basis.T, 0.999), basis)
    assert np.array_equal(subspace.grow(basis, np.zeros((4, 12)), 0.99), basis)


@pytest.mark.parametrize("seed", SEEDS)
def test_growth_from_nothing_and_by_residual_energy(seed):
    _, _, _, features, basis = random_problem(seed)
    fresh = subspace.grow(subspace.empty_basis(12), features, 0.99)
    sigma = np.linalg.svd(features, compute_uv=False)
    assert fresh.shape[1] == subspace.select(sigma, np.sum(sigma**2), 0.0, 0.99)
    assert subspace.grow(basis, features, 1.0).shape[1] == 12
    assert subspace.grow(basis, features[:1], 1.0).shape[1] == basis.shape[1] + 1
    total, residual = (subspace.num_new_directions(features, basis, 0.9, which) for which in ("total", "residual"))
    assert total <= residual


@pytest.mark.parametrize("seed", SEEDS)
def test_update_leaves_kept_inputs_alone_and_merges(seed):
    rng, weight, gradient, _, basis = random_problem(seed)
    a, b = subspace.initial_a(gradient, basis, 3), rng.standard_normal((9, 3))
    delta = subspace.delta_weight(a, b, 0.7)
    x = basis @ rng.standard_normal(basis.shape[1])
    assert np.linalg.norm(delta @ x) < TOL
    assert subspace.leak(delta, basis) < TOL < subspace.leak(gradient, basis)
    assert np.allclose(delta, delta @ a.T @ a)
    assert np.linalg.matrix_rank(delta) <= 3
    merged = subspace.merge(weight, [(a, b, 0.7), (a, b, 0.3)])
    y = rng.standard_normal(12)
    assert np.allclose(merged @ y, weight @ y + b @ (a @ y))
    assert subspace.leak(np.zeros((9, 12)), basis) == 0.0


def test_layer_scale_rises_from_gamma_to_one():
    g = [subspace.layer_scale(layer, 0, 32) for layer in range(32)]
    assert np.allclose([g[0], g[8], g[16], g[24], g[31]], [0.2, 0.406, 0.613, 0.819, 1.0], atol=5e-4)
    assert np.isclose(np.mean(g), 0.6)
    assert all(low < high for low, high in pairwise(g))
    assert subspace.layer_scale(5, 5, 1) == 1.0
    assert subspace.layer_scale(6, 5, 3, gamma=1.0) == 1.0


def test_projectors_and_angles_measure_spans():
    plane = np.eye(4)[:, :2]
    tilted = np.array([[1, 0, 0, 0], [0, np.cos(0.3), np.sin(0.3), 0]]).T
    assert np.allclose(subspace.principal_angles(plane, tilted), [0.0, 0.3])
    assert np.allclose(subspace.principal_angles(plane, plane[:, 1:]), [0.0])
    assert np.isclose(subspace.projector_difference(plane, tilted), np.sin(0.3))
    assert subspace.projector_difference(plane, plane @ np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0]])) < TOL
    assert np.isclose(subspace.projector_difference(plane, plane[:, :1]), 1.0)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu"])
def test_chain_rule_gradient_agrees_with_finite_differences(loss, activation):
    weights = keeplora_run.toy_weights(3, (4, 5, 3))
    (samples, targets), *_ = keeplora_run.toy_stream(4, 4, 3, 1, 5, loss=loss)
    exact = training.mean_gradient(weights, samples, targets, loss, activation)
    slow = training.mean_gradient_by_differences(weights, samples, targets, loss, activation)
    assert [g.shape for g in exact] == [(5, 4), (3, 5)]
    for left, right in zip(exact, slow, strict=True):
        assert np.abs(left).max() > 1e-3
        assert np.allclose(left, right, atol=1e-8)


def test_sgd_step_follows_equation_six_and_scales_with_the_square_of_g():
    _, weight, _, features, basis = random_problem(0)
    targets = np.zeros((30, 9))
    gradient = training.mean_gradient([weight], features, targets)[0]
    a = subspace.initial_a(gradient, basis, 3)

    def loss_of_b(b):
        return training.mean_loss([subspace.merge(weight, [(a, b, 2.0 * 0.4)])], features, targets)

    gradient_b = training.finite_difference(loss_of_b, np.zeros((9, 3)), step=1e-3)
    assert np.allclose(gradient_b, training.gradient_of_b(gradient, a, 2.0, 0.4), atol=1e-7)
    delta = training.sgd_delta_weight(gradient, a, 2.0, 0.4, lr=0.01)
    assert np.allclose(delta, training.delta_weight_after_step(gradient, a, 2.0, 0.4, lr=0.01))
    assert np.allclose(delta, subspace.delta_weight(a, -0.01 * gradient_b, 0.8), atol=1e-8)
    assert np.allclose(training.sgd_delta_weight(gradient, a, 2.0, 0.2, 0.01) * 4.0, delta)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("source", ["activations", "post_gradient"])
def test_toy_run_keeps_every_invariant(loss, source):
    weights = keeplora_run.toy_weights(0, (8, 6, 3))
    domains = keeplora_run.toy_stream(1, 8, 3, 3, 12, loss=loss)
    recipe = keeplora_run.Recipe(
        loss=loss, feature_source=source, energy_weights=0.4, energy_features=0.8, layer_scales=(0.2, 1.0)
    )
    records = keeplora_run.run(weights, domains, recipe)
    assert len(records) == 3
    before, moved = weights, 0
    for record, (samples, _) in zip(records, domains, strict=True):
        features = training.collect_features(record.weights, samples)
        for i in range(2):
            delta, q = record.weights[i] - before[i], record.kept_before[i]
            grown = record.kept_after[i]
            moved += np.linalg.norm(delta) > 1e-6
            assert np.linalg.norm(delta @ q) < TOL
            assert np.abs(record.a[i] @ q).max(initial=0.0) < TOL
            assert np.allclose(delta, 2.0 * (0.2, 1.0)[i] * record.b[i] @ record.a[i])
            assert np.array_equal(grown[:, : q.shape[1]], q)
            assert source == "post_gradient" or subspace.coverage(grown, features[i]) >= 0.8
        assert record.losses[-1] < record.losses[0]
        before = record.weights
    assert moved >= 5
    scores = keeplora_run.score_matrix(records, domains, recipe)
    assert np.isclose(scores[2][2], records[2].losses[-1])


def test_one_layer_toy_run_retains_inputs_that_are_fully_covered():
    weights = keeplora_run.toy_weights(2, (10, 3))
    domains = keeplora_run.toy_stream(2, 10, 3, 2, 15)
    recipe = keeplora_run.Recipe(energy_weights=0.3, energy_features=1.0)
    domains[0] = (domains[0][0] @ subspace.projector(np.eye(10)[:, :4]), domains[0][1])
    first, second = keeplora_run.run(weights, domains, recipe)
    assert np.linalg.norm(second.weights[0] - first.weights[0]) > 1e-3
    assert np.allclose(domains[0][0] @ first.weights[0].T, domains[0][0] @ second.weights[0].T, atol=TOL)
    anchored = keeplora_run.Recipe(energy_weights=0.3, anchors=domains[0][0], energy_anchor=1.0)
    records = keeplora_run.run(weights, domains[1:], anchored)
    assert np.allclose(domains[0][0] @ records[0].weights[0].T, domains[0][0] @ weights[0].T, atol=TOL)


def test_worked_example_of_the_metrics():
    values = {
        "last": (metrics.last(MATRIX), 69.6667),
        "average": (metrics.average(MATRIX), 58.3333),
        "transfer": (metrics.transfer(MATRIX), 36.0),
        "mft": (metrics.mft(MATRIX), 73.3333),
        "mfn": (metrics.mfn(MATRIX), 69.6667),
        "maa": (metrics.maa(MATRIX), 68.8889),
        "bwt": (metrics.bwt(MATRIX), -5.5),
        "ap_2": (metrics.ap(MATRIX, 2), 67.0),
        "ap_3": (metrics.ap(MATRIX, 3), 69.6667),
        "ft_2": (metrics.ft(MATRIX, 2), -4.0),
        "ft_3": (metrics.ft(MATRIX, 3), 7.5),
        "forgetting": (metrics.forgetting(MATRIX), 7.5),
        "fwt": (metrics.fwt(MATRIX, BASE), 2.0),
        "fwt_alone": (metrics.fwt_alone(MATRIX, ALONE), -3.0),
    }
    for name, (value, expected) in values.items():
        assert value == pytest.approx(expected, abs=5e-5), name
    assert metrics.average_per_domain(MATRIX) == pytest.approx([69.6667, 48.6667, 56.6667], abs=5e-5)
    assert metrics.transfer_per_domain(MATRIX) == [32.0, 40.0]
    assert metrics.bwt(MATRIX) == pytest.approx(1.5 * (metrics.mfn(MATRIX) - metrics.mft(MATRIX)))


def test_lower_triangle_is_enough_where_it_should_be():
    functions = [metrics.mft, metrics.mfn, metrics.maa, metrics.bwt, metrics.forgetting]
    expected = [70.6017, 56.7267, 72.8986, -16.65, 16.65]
    assert [f(UCIT_LORA) for f in functions] == pytest.approx(expected, abs=5e-5)
    needs_all = [metrics.average(UCIT_LORA), metrics.transfer(UCIT_LORA), metrics.fwt(UCIT_LORA, [0] * 6)]
    assert needs_all == [None, None, None]
    assert metrics.forgetting(UCIT_LORA, include_unseen=True) is None
    assert [metrics.transfer([[5]]), metrics.bwt([[5]]), metrics.forgetting([[5]])] == [None, None, None]
