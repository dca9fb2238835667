"""The protected subspace: projection, growth, coverage, leak."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis, FrequentDirections, MomentAccumulator, leak

QUICK = settings(max_examples=40, deadline=None)
D_IN = 24


def rows_of(n, seed, d_in=D_IN, rank=None, decay=1.5):
    """Rows (n, d_in) with a falling spectrum; of the given rank if one is named."""
    generator = torch.Generator().manual_seed(seed)
    rank = d_in if rank is None else rank
    mixing = torch.randn(rank, d_in, generator=generator)
    return torch.randn(n, rank, generator=generator) * torch.logspace(0, -decay, rank) @ mixing


def basis_of(rank, seed, d_in=D_IN):
    generator = torch.Generator().manual_seed(seed)
    return Basis.from_columns(torch.linalg.qr(torch.randn(d_in, rank, generator=generator))[0])


def gram_error(basis):
    columns = basis.columns.double()
    if basis.rank == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(columns.mT @ columns - torch.eye(basis.rank), 2))


def moments_of(rows, dtype=torch.float32):
    moments = MomentAccumulator(rows.shape[1], dtype=dtype)
    moments.update(rows)
    return moments


def sketch_of(rows, size):
    sketch = FrequentDirections(rows.shape[1], size)
    sketch.update(rows)
    return sketch


def share_covered(basis, rows):
    rows = rows.double()
    return float((rows @ basis.columns.double()).square().sum() / rows.square().sum())


SOURCES = {
    "rows": lambda rows: rows,
    "moments": moments_of,
    "moments64": lambda rows: moments_of(rows, torch.float64),
    "sketch": lambda rows: sketch_of(rows, rows.shape[1]),
}


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
