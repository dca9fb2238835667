"""The protected subspace: growth, covered energy, limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis, FrequentDirections, MomentAccumulator
from tests.support.bases import D_IN, SOURCES, basis_of, gram_error, moments_of, rows_of, share_covered, sketch_of

QUICK = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize("source", SOURCES)
@QUICK
@given(n=st.integers(1, 60), kept=st.integers(0, D_IN), energy=st.floats(0.01, 0.9999), seed=st.integers(0, 99))
def test_growth_covers_the_energy_and_no_column_is_spare(source, n, kept, energy, seed):
    basis, rows = basis_of(kept, seed), rows_of(n, seed + 1)
    before = basis.columns.clone()
    added = basis.grow(SOURCES[source](rows), energy)
    assert basis.rank == kept + added <= D_IN
    assert torch.equal(basis.columns[:, :kept], before)
    assert gram_error(basis) < 1e-5
    assert share_covered(basis, rows) >= energy - 1e-5
    if added:
        shorter = Basis.from_columns(basis.columns[:, :-1])
        assert share_covered(shorter, rows) < energy + 1e-5


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("energy", [0.5, 0.99, 1.0])
def test_the_same_features_twice_add_nothing(source, energy):
    rows = rows_of(80, 3, rank=9)
    basis = basis_of(4, 3)
    assert 0 < basis.grow(SOURCES[source](rows), energy) <= 9
    assert basis.grow(SOURCES[source](rows), energy) == 0


@pytest.mark.parametrize("source", SOURCES)
def test_features_inside_the_basis_add_nothing_even_at_full_energy(source):
    basis = basis_of(10, 4)
    generator = torch.Generator().manual_seed(5)
    inside = torch.randn(200, 10, generator=generator) @ basis.columns.mT
    assert basis.grow(SOURCES[source](inside), 1.0) == 0
    assert basis.grow(SOURCES[source](inside), 1.0, reference="residual") == 0
    assert basis.coverage(SOURCES[source](inside)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_a_rank_deficient_stream_adds_its_rank_at_full_energy(source):
    for n in (12, 300):
        basis = Basis(D_IN)
        assert basis.grow(SOURCES[source](rows_of(n, 6, rank=5)), 1.0) == 5


def test_rounding_noise_of_float32_moments_is_never_added():
    basis, d_in = Basis(256), 256
    moments = MomentAccumulator(d_in)
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(20, d_in, generator=generator)
    for _ in range(50):
        moments.update(torch.randn(64, 20, generator=generator) @ directions)
    assert basis.grow(moments, 1.0) == 20
    assert basis.grow(moments, 1.0, reference="residual") == 0
    assert gram_error(basis) < 1e-5


def test_moments_rows_and_svd_give_the_same_subspace():
    rows, kept = rows_of(300, 8, d_in=64), basis_of(10, 8, d_in=64)
    residual = rows.double() - rows.double() @ kept.columns.double() @ kept.columns.double().mT
    _, singular, right = torch.linalg.svd(residual, full_matrices=False)
    total = rows.double().square().sum()
    covered = 1 - residual.square().sum() / total
    wanted = int((covered + singular.square().cumsum(0) / total < 0.99).sum()) + 1
    expected = right[:wanted].mT
    for source in SOURCES.values():
        basis = Basis.from_columns(kept.columns)
        assert basis.grow(source(rows), 0.99) == wanted
        added = basis.columns[:, 10:].double()
        assert torch.linalg.matrix_norm(added @ added.mT - expected @ expected.mT, 2) < 1e-5


def test_covered_energy_counts_towards_the_total_but_not_towards_the_residual():
    kept = Basis.from_columns(torch.eye(6)[:, :1])
    rows = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0, 0.0]))  # energies 9, 1, 0.25 of 10.25
    total, residual = Basis.from_columns(kept.columns), Basis.from_columns(kept.columns)
    assert total.grow(rows, 0.85) == 0
    assert residual.grow(rows, 0.7, reference="residual") == 1
    assert residual.grow(rows, 0.85, reference="residual") == 1
    assert residual.grow(rows, 0.85, reference="residual") == 0
    assert total.grow(rows, 0.95) == 1
    assert torch.allclose(total.columns[:, 1], torch.eye(6)[1], atol=1e-6)


def test_growth_keeps_orthonormality_over_many_domains_and_stops_at_the_dimension():
    basis, ranks = Basis(48), []
    for domain in range(12):
        basis.grow(moments_of(rows_of(100, domain, d_in=48, rank=12)), 0.9999)
        ranks.append(basis.rank)
        assert gram_error(basis) < 1e-5
    assert ranks == sorted(ranks)
    assert ranks[-1] == 48


def test_a_limit_keeps_the_strongest_directions():
    rows = rows_of(100, 9)
    free, limited = Basis(D_IN), Basis(D_IN)
    assert free.grow(rows, 0.99) > 3
    assert limited.grow(rows, 0.99, limit=3) == 3
    assert torch.allclose(limited.columns, free.columns[:, :3], atol=1e-6)
    assert limited.grow(rows, 0.99, limit=0) == 0


def test_directions_do_not_depend_on_the_sign_of_the_features():
    one, other = Basis(D_IN), Basis(D_IN)
    rows = rows_of(10, 10)
    one.grow(rows, 0.9)
    other.grow(-rows, 0.9)
    assert torch.equal(one.columns, other.columns)
    assert bool((one.columns.gather(0, one.columns.abs().argmax(0, keepdim=True)) > 0).all())


def test_no_energy_adds_nothing_and_counts_as_covered():
    basis = Basis(D_IN)
    for nothing in (torch.zeros(5, D_IN), torch.zeros(0, D_IN), MomentAccumulator(D_IN), FrequentDirections(D_IN, 4)):
        assert basis.grow(nothing, 0.99) == 0
        assert basis.grow(nothing, 0.99, reference="residual") == 0
        assert basis.coverage(nothing) == 1.0
    assert basis.grow(rows_of(5, 0), 0.0) == 0


@pytest.mark.parametrize("source", SOURCES)
def test_growth_does_not_depend_on_the_scale_of_the_features(source):
    rows, columns = rows_of(60, 20, rank=12), []
    for scale in (1.0, 1e-15, 1e9):
        basis = Basis(D_IN)
        assert basis.grow(SOURCES[source](scale * rows), 0.9999) > 6
        columns.append(basis.columns)
    assert torch.allclose(columns[0], columns[1], atol=1e-2)
    assert torch.allclose(columns[0], columns[2], atol=1e-2)


def test_one_row_becomes_its_own_direction():
    basis, row = Basis(D_IN), rows_of(1, 11)
    assert basis.grow(row, 0.99) == 1
    assert torch.allclose(basis.project(row), row, atol=1e-5)


def test_half_precision_rows_grow_like_their_float32_values():
    rows = rows_of(40, 12).bfloat16()
    one, other = Basis(D_IN), Basis(D_IN)
    assert one.grow(rows, 0.9) == other.grow(rows.float(), 0.9) > 0
    assert torch.equal(one.columns, other.columns)


def test_energy_lost_by_a_sketch_counts_as_not_covered():
    rows = rows_of(400, 13, decay=0.5)
    lossy = sketch_of(rows, 8)
    exact, careful = Basis(D_IN), Basis(D_IN)
    exact.grow(rows, 0.6)
    careful.grow(lossy, 0.6)
    assert lossy.shrunken_energy > 0
    assert careful.rank == 8
    assert exact.coverage(lossy) <= exact.coverage(rows)
    assert careful.coverage(rows) == pytest.approx(share_covered(careful, rows), abs=1e-6)
