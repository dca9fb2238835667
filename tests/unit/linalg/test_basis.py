"""The protected subspace: projection, columns, capacity, leak."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis, FrequentDirections, MomentAccumulator, leak
from tests.support.bases import D_IN, basis_of, gram_error, rows_of

QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(st.integers(0, D_IN), st.integers(1, 40), st.integers(0, 99))
def test_project_is_idempotent_and_the_parts_sum_to_the_whole(rank, n, seed):
    basis, rows = basis_of(rank, seed), rows_of(n, seed + 1)
    inside, outside = basis.project(rows), basis.residual(rows)
    assert torch.allclose(inside + outside, rows, atol=1e-5)
    assert torch.allclose(basis.project(inside), inside, atol=1e-5)
    assert torch.allclose(outside @ basis.columns, torch.zeros(n, rank), atol=1e-5)


def test_an_empty_and_a_full_basis():
    rows = rows_of(5, 0)
    empty, full = Basis(D_IN), basis_of(D_IN, 0)
    assert torch.equal(empty.residual(rows), rows)
    assert not empty.project(rows).any()
    assert torch.allclose(full.project(rows), rows, atol=1e-5)
    assert full.grow(rows, 1.0) == 0
    assert (empty.rank, empty.d_in, full.rank) == (0, D_IN, D_IN)


def test_projection_keeps_float64_and_promotes_half_precision():
    basis, rows = basis_of(6, 1), rows_of(4, 1)
    assert basis.project(rows.double()).dtype == torch.float64
    assert basis.residual(rows.bfloat16()).dtype == torch.float32
    assert torch.allclose(basis.project(rows.bfloat16()), basis.project(rows.bfloat16().float()))
    assert not basis.residual(rows.requires_grad_()).requires_grad


def test_capacity_counts_what_is_left():
    capacity = basis_of(6, 14).capacity()
    assert (capacity.rank, capacity.d_in, capacity.share, capacity.free) == (6, D_IN, 0.25, 18)


def test_columns_survive_a_round_trip_bit_for_bit_and_are_copied():
    basis = Basis(D_IN)
    basis.grow(rows_of(50, 15), 0.95)
    again = Basis.from_columns(basis.columns)
    assert torch.equal(again.columns, basis.columns)
    assert again.columns.data_ptr() != basis.columns.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_stored_in_half_precision_are_orthonormalised_again(dtype):
    exact = Basis(D_IN)
    exact.grow(rows_of(60, 16), 1.0, limit=9)
    repaired = Basis.from_columns(exact.columns.to(dtype))
    assert gram_error(repaired) < 1e-6
    assert torch.allclose(repaired.columns, exact.columns, atol=2e-2)


def test_columns_that_are_not_a_basis_are_refused():
    with pytest.raises(ValueError, match=r"orthonormal to 0.02, got a Gram error of 3"):
        Basis.from_columns(2 * torch.eye(4)[:, :2])
    with pytest.raises(ValueError, match="orthonormal"):
        Basis.from_columns(torch.ones(4, 2) / 2)
    with pytest.raises(ValueError, match="at most 3 columns, got 5"):
        Basis.from_columns(torch.randn(3, 5))
    with pytest.raises(ValueError, match="basis columns must have shape"):
        Basis.from_columns(torch.randn(3))
    with pytest.raises(ValueError, match="d_in must be a whole number of at least 1, got 0"):
        Basis(0)


def test_bad_features_and_options_are_refused_and_change_nothing():
    basis = basis_of(3, 17)
    before = basis.columns.clone()
    broken = rows_of(4, 17)
    broken[2, 5] = float("nan")
    for call in (basis.grow, basis.project, basis.residual, basis.coverage):
        extra = (0.9,) if call == basis.grow else ()
        with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
            call(broken, *extra)
        with pytest.raises(ValueError, match=r"got \(4, 5\)"):
            call(torch.randn(4, 5), *extra)
    for source in (MomentAccumulator(5), FrequentDirections(5, 2)):
        with pytest.raises(ValueError, match="must have shape"):
            basis.grow(source, 0.9)
    with pytest.raises(ValueError, match=r"energy must be in \[0, 1\], got 99"):
        basis.grow(rows_of(4, 17), 99)
    with pytest.raises(ValueError, match="reference must be one of total, residual"):
        basis.grow(rows_of(4, 17), 0.9, reference="all")
    with pytest.raises(ValueError, match="limit must be a whole number of at least 0"):
        basis.grow(rows_of(4, 17), 0.9, limit=-1)
    with pytest.raises(ValueError, match=r"rows must be a torch.Tensor"):
        basis.grow([[1.0] * D_IN], 0.9)
    assert torch.equal(basis.columns, before)


def test_leak_is_the_share_of_a_change_inside_the_basis():
    basis = basis_of(6, 18)
    generator = torch.Generator().manual_seed(19)
    delta = torch.randn(10, D_IN, generator=generator)
    assert leak(delta, basis) == pytest.approx(float((delta @ basis.columns).norm() / delta.norm()), rel=1e-5)
    assert leak(basis.residual(delta), basis) < 1e-6
    assert leak(basis.project(delta), basis) == pytest.approx(1.0, abs=1e-6)
    assert leak(torch.zeros(10, D_IN), basis) == 0.0
    assert leak(delta, Basis(D_IN)) == 0.0
    with pytest.raises(ValueError, match="delta_weight must have shape"):
        leak(torch.randn(D_IN, 10), basis)
