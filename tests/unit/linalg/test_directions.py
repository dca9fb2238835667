"""Adapter directions: orthonormal, outside the basis, optimal, fewer when the residual space is exhausted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import (
    Basis,
    GradientAccumulator,
    GradientSketch,
    gradient_capture,
    leak,
    top_residual_directions,
)

QUICK = settings(max_examples=40, deadline=None)
D_OUT, D_IN = 18, 24


def basis_of(rank, seed, d_in=D_IN):
    generator = torch.Generator().manual_seed(seed)
    return Basis.from_columns(torch.linalg.qr(torch.randn(d_in, rank, generator=generator))[0])


def gradient_of(seed, d_out=D_OUT, d_in=D_IN, rank=None, decay=1.0, scale=1e-3):
    generator = torch.Generator().manual_seed(seed)
    rank = min(d_out, d_in) if rank is None else rank
    left, right = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    return scale * left * torch.logspace(0, -decay, rank) @ right


def assert_valid(directions, basis, tolerance=1e-5):
    count = directions.shape[0]
    assert torch.linalg.matrix_norm(directions @ directions.mT - torch.eye(count), 2) < tolerance if count else True
    if count and basis.rank:
        inside = (directions.double() @ basis.columns.double()).norm(dim=1)
        assert float(inside.max()) < tolerance


@QUICK
@given(st.integers(0, D_IN), st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_directions_are_orthonormal_and_outside_the_basis(kept, rank, d_out, seed):
    basis, gradient = basis_of(kept, seed), gradient_of(seed + 1, d_out)
    directions = top_residual_directions(gradient, basis, rank)
    assert directions.shape == (min(rank, D_IN - kept, d_out), D_IN)
    assert_valid(directions, basis)


@pytest.mark.parametrize("shape", [(18, 24), (40, 24), (24, 24)])
def test_directions_are_the_leading_ones_of_the_residual_and_the_optimal_choice(shape):
    basis, gradient = basis_of(7, 1), gradient_of(2, *shape)
    directions = top_residual_directions(gradient, basis, 5)
    residual = gradient.double() - gradient.double() @ basis.columns.double() @ basis.columns.double().mT
    _, singular, right = torch.linalg.svd(residual, full_matrices=False)
    assert torch.allclose(directions.double().mT @ directions.double(), right[:5].mT @ right[:5], atol=1e-5)
    captured = float((gradient @ directions.mT).square().sum())
    assert captured == pytest.approx(float(singular[:5].square().sum()), rel=1e-5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        other = torch.linalg.qr(basis.residual(torch.randn(5, D_IN, generator=generator)).mT)[0]
        assert float((gradient @ other).square().sum()) <= captured * (1 + 1e-6)


@pytest.mark.parametrize("free", [0, 1, 4])
def test_an_exhausted_space_gives_fewer_directions_never_one_inside_the_basis(free):
    d_in = 128
    basis, gradient = basis_of(d_in - free, 4, d_in), gradient_of(5, 96, d_in)
    directions = top_residual_directions(gradient, basis, 16)
    assert directions.shape == (free, d_in)
    assert_valid(directions, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_inside_the_basis_gives_no_direction(dtype):
    basis = basis_of(12, 6)
    generator = torch.Generator().manual_seed(7)
    inside = (torch.randn(D_OUT, 12, generator=generator) @ basis.columns.mT).to(dtype)
    assert top_residual_directions(inside, basis, 4).shape == (0, D_IN)


def test_noise_is_measured_against_the_gradient_before_projection():
    basis = Basis.from_columns(torch.eye(D_IN)[:, :4])
    gradient = torch.zeros(D_OUT, D_IN)
    gradient[0, 0], gradient[1, 10], gradient[2, 11] = 1.0, 1e-4, 1e-8
    directions = top_residual_directions(gradient, basis, 4)
    assert torch.allclose(directions, torch.eye(D_IN)[10:11], atol=1e-6)


def test_a_weak_direction_that_is_real_is_found_clean_of_the_basis():
    basis = basis_of(20, 8, 64)
    generator = torch.Generator().manual_seed(9)
    weak = torch.nn.functional.normalize(basis.residual(torch.randn(1, 64, generator=generator).double()))
    strong = torch.randn(30, 20, generator=generator).double() @ basis.columns.double().mT
    gradient = strong + 1e-4 * torch.randn(30, 1, generator=generator).double() @ weak
    directions = top_residual_directions(gradient, basis, 3)
    assert directions.shape == (1, 64)
    assert abs(float(directions[0] @ weak[0])) == pytest.approx(1.0, abs=1e-6)
    assert_valid(directions.float(), basis, 1e-6)


def test_a_rank_deficient_a_zero_and_a_one_row_gradient():
    basis = basis_of(3, 10)
    assert top_residual_directions(gradient_of(11, rank=2), basis, 8).shape == (2, D_IN)
    assert top_residual_directions(torch.zeros(D_OUT, D_IN), basis, 8).shape == (0, D_IN)
    assert top_residual_directions(gradient_of(12, d_out=1), basis, 8).shape == (1, D_IN)


def test_directions_are_deterministic_up_to_nothing():
    basis, gradient = basis_of(5, 13), gradient_of(14)
    one = top_residual_directions(gradient, basis, 6)
    assert torch.equal(one, top_residual_directions(gradient, basis, 6))
    assert torch.equal(one, top_residual_directions(-gradient, basis, 6))
    assert bool((one.gather(1, one.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.allclose(one, top_residual_directions(1e-12 * gradient, basis, 6), atol=1e-4)


def test_half_precision_gradients_count_with_their_exact_values():
    basis, gradient = basis_of(5, 15), gradient_of(16).bfloat16()
    directions = top_residual_directions(gradient, basis, 6)
    assert directions.dtype == torch.float32
    assert torch.equal(directions, top_residual_directions(gradient.float(), basis, 6))


def test_changes_within_the_directions_do_not_touch_protected_inputs():
    basis = basis_of(9, 17)
    directions = top_residual_directions(gradient_of(18), basis, 6)
    generator = torch.Generator().manual_seed(19)
    delta = torch.randn(D_OUT, 6, generator=generator) @ directions
    protected = torch.randn(50, 9, generator=generator) @ basis.columns.mT
    change = (protected @ delta.mT).norm(dim=1) / (protected.norm(dim=1) * delta.norm())
    assert float(change.max()) < 1e-5
    assert leak(delta, basis) < 1e-5


def streamed(accumulator, seed, n=400, kept=8):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, D_IN, generator=generator) * torch.logspace(0, -3, D_IN)
    accumulator.update(inputs @ torch.randn(D_IN, D_OUT, generator=generator), inputs)
    accumulator.count_samples(n)
    return accumulator


def test_a_sketch_captures_nearly_as_much_as_the_gradient_and_never_leaks():
    exact = streamed(GradientAccumulator(D_OUT, D_IN), 20)
    sketch = streamed(GradientSketch(D_OUT, D_IN, width=16, seed=3), 20)
    basis = basis_of(6, 21)
    best = gradient_capture(exact.mean, basis, top_residual_directions(exact, basis, 4))
    directions = top_residual_directions(sketch, basis, 4)
    assert_valid(directions, basis)
    assert gradient_capture(exact.mean, basis, directions)["captured"] > 0.95 * best["captured"]
    assert gradient_capture(sketch, basis, directions)["protected"] == pytest.approx(best["protected"], abs=0.2)


@QUICK
@given(st.integers(0, D_IN), st.integers(1, 8), st.integers(0, 99))
def test_capture_splits_the_energy_into_three_parts(kept, rank, seed):
    basis, gradient = basis_of(kept, seed), gradient_of(seed + 1)
    directions = top_residual_directions(gradient, basis, rank)
    split = gradient_capture(gradient, basis, directions)
    assert split["protected"] + split["captured"] + split["discarded"] == pytest.approx(1.0, abs=1e-9)
    assert all(0.0 <= share <= 1.0 for share in split.values())
    total = gradient.double().square().sum()
    assert split["protected"] == pytest.approx(
        float((gradient @ basis.columns).double().square().sum() / total), abs=1e-5
    )
    assert split["captured"] == pytest.approx(
        float((gradient @ directions.mT).double().square().sum() / total), abs=1e-5
    )
    outside = split["captured"] + split["discarded"]
    if outside > 1e-6:
        assert split["captured_of_residual"] == pytest.approx(split["captured"] / outside, rel=1e-6)


def test_what_an_adapter_holds_inside_the_basis_counts_as_protected():
    basis, gradient = basis_of(4, 26), gradient_of(27)
    split = gradient_capture(gradient, basis, basis.columns[:, :2].mT)
    assert split["captured"] == pytest.approx(0.0, abs=1e-9)
    rounded = top_residual_directions(gradient, basis, 4).bfloat16()
    split = gradient_capture(gradient, basis, rounded)
    assert split["protected"] + split["captured"] + split["discarded"] == pytest.approx(1.0, abs=1e-9)


def test_capture_of_nothing_and_by_nothing():
    basis, empty = basis_of(4, 22), torch.zeros(0, D_IN)
    assert set(gradient_capture(torch.zeros(D_OUT, D_IN), basis, empty).values()) == {0.0}
    split = gradient_capture(gradient_of(23), basis, empty)
    assert split["captured"] == split["captured_of_residual"] == 0.0
    assert split["protected"] + split["discarded"] == pytest.approx(1.0)


def test_what_does_not_fit_is_refused():
    basis, gradient = basis_of(4, 24), gradient_of(25)
    with pytest.raises(ValueError, match=r"gradient must have shape \(n, 24\), got \(24, 18\)"):
        top_residual_directions(gradient.mT, basis, 4)
    with pytest.raises(ValueError, match="gradient must be finite"):
        top_residual_directions(gradient * float("nan"), basis, 4)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        top_residual_directions(gradient, basis, 0)
    with pytest.raises(ValueError, match="orthonormal"):
        gradient_capture(gradient, basis, torch.ones(2, D_IN))
    with pytest.raises(ValueError, match=r"A must have shape"):
        gradient_capture(gradient, basis, torch.eye(3))
