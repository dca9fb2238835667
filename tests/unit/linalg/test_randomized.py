"""Adapter directions by a range finder: as valid as the exact ones, and nearly as good."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import (
    Basis,
    GradientAccumulator,
    GradientSketch,
    RandomizedSVD,
    top_residual_directions,
)
from tests.oracles import subspace
from tests.support.bases import basis_of

QUICK = settings(max_examples=40, deadline=None)
D_OUT, D_IN = 80, 96
SPECTRA = {
    "exponential": 0.85 ** np.arange(80),
    "power": 1.0 / np.arange(1, 81),
    "slow": 1.0 / np.sqrt(np.arange(1, 81)),
    "step": np.where(np.arange(80) < 6, 1.0, 1e-3),
}
PUBLISHED = RandomizedSVD(oversample=0, power_iterations=2)
BARE = RandomizedSVD(oversample=0, power_iterations=0)


def gradient_of(spectrum, seed, d_in=D_IN):
    """Gradient (80, d_in), float32, with given singular values."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((D_OUT, D_OUT)))
    right, _ = np.linalg.qr(rng.standard_normal((d_in, D_OUT)))
    return torch.tensor(1e-3 * (left * SPECTRA[spectrum]) @ right.T).float()


def assert_valid(directions, basis, tolerance=1e-5):
    """[1, 2]"""
    rows = directions.double().numpy()
    assert np.linalg.norm(rows @ rows.T - np.eye(len(rows))) < tolerance
    assert np.abs(rows @ basis.columns.double().numpy()).max(initial=0.0) < tolerance


def energy_within(gradient, directions):
    return subspace.energy(gradient.double().numpy() @ directions.double().numpy().T)


def best_energy(gradient, basis, rank):
    """Energy of the top `rank` singular values of the residual."""
    residual = subspace.residual_gradient(gradient.numpy(), basis.columns.double().numpy())
    return float((np.linalg.svd(residual, compute_uv=False)[:rank] ** 2).sum())


@QUICK
@given(
    st.sampled_from(sorted(SPECTRA)),
    st.integers(0, D_IN - 1),
    st.integers(1, 12),
    st.sampled_from([RandomizedSVD(), PUBLISHED, BARE, RandomizedSVD(oversample=5, seed=3)]),
    st.integers(0, 99),
)
def test_rows_are_orthonormal_and_outside_the_basis_with_any_settings(spectrum, kept, rank, randomized, seed):
    basis, gradient = basis_of(kept, seed, D_IN), gradient_of(spectrum, seed + 1)
    directions = top_residual_directions(gradient, basis, rank, randomized)
    assert directions.shape == (min(rank, D_IN - kept, D_OUT), D_IN)
    assert directions.dtype == torch.float32
    assert_valid(directions, basis)


@pytest.mark.parametrize("spectrum", ["exponential", "power", "slow"])
@pytest.mark.parametrize("kept", [0, 30])
def test_default_settings_capture_nearly_all_that_an_exact_decomposition_does(spectrum, kept):
    """[14]"""
    for rank, seed in itertools.product((1, 4, 12), range(3)):
        basis, gradient = basis_of(kept, seed, D_IN), gradient_of(spectrum, seed + 1)
        best = best_energy(gradient, basis, rank)
        captured = energy_within(gradient, top_residual_directions(gradient, basis, rank, RandomizedSVD(seed=seed)))
        assert 0.99 * best <= captured <= (1 + 1e-5) * best


def test_a_range_as_wide_as_the_gradient_gives_the_exact_directions():
    basis, gradient = basis_of(20, 1, D_IN), gradient_of("power", 2)
    exact = top_residual_directions(gradient, basis, 6)
    for randomized in (RandomizedSVD(oversample=D_OUT), RandomizedSVD(oversample=10 * D_OUT, power_iterations=0)):
        found = top_residual_directions(gradient, basis, 6, randomized)
        assert torch.allclose(found, exact, atol=1e-4)


def test_more_oversampling_and_more_iterations_capture_more():
    """The published settings lose what the default ones keep."""
    rows = []
    for seed in range(20):
        basis, gradient = basis_of(10, seed, D_IN), gradient_of("slow", seed + 1)
        settings_tried = [RandomizedSVD(p, q, seed) for p, q in ((0, 0), (0, 2), (None, 4))]
        rows.append(
            [energy_within(gradient, top_residual_directions(gradient, basis, 8, each)) for each in settings_tried]
        )
    bare, published, default = np.mean(rows, axis=0)
    assert bare < 0.8 * published and published < 0.999 * default


@pytest.mark.parametrize("randomized", [RandomizedSVD(), PUBLISHED, BARE])
@pytest.mark.parametrize("free", [0, 1, 4, 12])
def test_an_exhausted_basis_gives_fewer_directions_never_one_inside(randomized, free):
    """[20]"""
    for seed in range(5):
        basis, gradient = basis_of(D_IN - free, seed, D_IN), gradient_of("slow", seed + 1)
        directions = top_residual_directions(gradient, basis, 16, randomized)
        assert directions.shape == (free, D_IN)
        assert_valid(directions, basis)


@pytest.mark.parametrize("randomized", [RandomizedSVD(), PUBLISHED, BARE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_inside_the_basis_gives_no_direction(randomized, dtype):
    """[20]: rounding noise is no signal, however many dimensions are free."""
    basis = basis_of(40, 6, D_IN)
    coordinates = torch.randn(D_OUT, 40, generator=torch.Generator().manual_seed(7))
    inside = coordinates.to(dtype) @ basis.columns.mT.to(dtype)
    assert top_residual_directions(inside, basis, 4, randomized).shape == (0, D_IN)


@pytest.mark.parametrize("randomized", [RandomizedSVD(), PUBLISHED])
def test_a_residual_of_low_rank_gives_its_rank_and_its_span(randomized):
    basis = basis_of(30, 8, D_IN)
    generator = torch.Generator().manual_seed(9)
    real = torch.linalg.qr(basis.residual(torch.randn(3, D_IN, generator=generator)).mT)[0].mT
    strong = torch.randn(D_OUT, 30, generator=generator) @ basis.columns.mT
    gradient = (strong + 0.1 * torch.randn(D_OUT, 3, generator=generator) @ real).double()
    directions = top_residual_directions(gradient, basis, 8, randomized)
    assert directions.shape == (3, D_IN)
    assert subspace.projector_difference(directions.mT.numpy(), real.mT.numpy()) < 1e-4


def test_no_gradient_gives_no_direction():
    assert top_residual_directions(torch.zeros(D_OUT, D_IN), basis_of(3, 1, D_IN), 4, RandomizedSVD()).shape[0] == 0


@pytest.mark.parametrize("randomized", [RandomizedSVD(seed=5), RandomizedSVD(0, 0, seed=5)])
def test_the_same_seed_gives_the_same_directions_and_touches_no_global_generator(randomized):
    """[19]"""
    basis, gradient = basis_of(10, 10, D_IN), gradient_of("slow", 11)
    before = torch.get_rng_state()
    first = top_residual_directions(gradient, basis, 8, randomized)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(first, top_residual_directions(gradient, basis, 8, randomized))


def test_another_seed_gives_another_draw():
    basis, gradient = basis_of(10, 10, D_IN), gradient_of("slow", 11)
    one, other = (top_residual_directions(gradient, basis, 8, RandomizedSVD(0, 0, seed)) for seed in (5, 6))
    assert not torch.allclose(one, other, atol=1e-2)


def test_accumulated_gradients_are_decomposed_like_plain_ones():
    generator = torch.Generator().manual_seed(12)
    inputs = torch.randn(300, D_IN, generator=generator) * torch.logspace(0, -2, D_IN)
    outputs = inputs @ torch.randn(D_IN, D_OUT, generator=generator)
    exact, sketch = GradientAccumulator(D_OUT, D_IN), GradientSketch(D_OUT, D_IN, width=48, seed=1)
    for accumulator in (exact, sketch):
        accumulator.update(outputs, inputs)
        accumulator.count_samples(3)
    basis = Basis.from_columns(torch.eye(D_IN)[:, :7])
    found = top_residual_directions(exact, basis, 5, RandomizedSVD())
    assert torch.equal(found, top_residual_directions(exact.mean, basis, 5, RandomizedSVD()))
    from_sketch = top_residual_directions(sketch, basis, 5, RandomizedSVD())
    assert_valid(from_sketch, basis)
    assert from_sketch.shape == (5, D_IN)
    best = energy_within(sketch.sketch.mT, top_residual_directions(sketch, basis, 5))
    assert 0.99 * best < energy_within(sketch.sketch.mT, from_sketch) <= (1 + 1e-5) * best
