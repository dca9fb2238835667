"""When a sketch knows enough to grow a basis by; and columns that are kept in a coarser dtype."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis
from tests.oracles import subspace
from tests.support.bases import D_IN, basis_of, gram_error, rows_of, sketch_of

QUICK = settings(max_examples=60, deadline=None)
REFERENCES = ("total", "residual")
cases = st.tuples(
    st.integers(1, 90), st.integers(2, D_IN), st.integers(0, D_IN - 1), st.floats(0.05, 1.0), st.integers(0, 999)
)


def share_reached(basis, kept, rows, reference):
    """Share of the rows' energy inside the basis: of all of it, or of that outside the first `kept` columns."""
    columns, rows = basis.columns.double().numpy(), rows.double().numpy()
    if reference == "residual":
        rows = subspace.residual_features(rows, columns[:, :kept])
    return subspace.coverage(columns, rows)


@pytest.mark.parametrize("reference", REFERENCES)
@QUICK
@given(cases, st.sampled_from([0.2, 1.0, 2.0]))
def test_growth_from_a_decided_sketch_reaches_the_threshold_on_all_rows_seen(reference, case, decay):
    n, size, kept, energy, seed = case
    basis, rows = basis_of(kept, seed), rows_of(n, seed + 1, decay=decay)
    sketch = sketch_of(rows, size)
    if not basis.is_decided(sketch, energy, reference):
        return
    basis.grow(sketch, energy, reference=reference)
    assert share_reached(basis, kept, rows, reference) >= energy - 1e-5


@pytest.mark.parametrize("reference", REFERENCES)
@QUICK
@given(cases, st.sampled_from([0.2, 1.0]))
def test_an_undecided_sketch_is_not_known_to_reach_the_threshold_with_all_its_directions(reference, case, decay):
    n, size, kept, energy, seed = case
    basis, rows = basis_of(kept, seed), rows_of(n, seed + 1, decay=decay)
    sketch = sketch_of(rows, size)
    if basis.is_decided(sketch, energy, reference):
        return
    assert sketch.shrunken_energy > 0
    basis.grow(sketch, 1.0)
    held = subspace.energy(sketch.sketch.double().numpy() @ basis.columns.double().numpy())
    total = sketch.total_energy
    if reference == "residual":
        before = subspace.energy(sketch.sketch.double().numpy() @ basis.columns[:, :kept].double().numpy())
        held, total = held - before, total - before
    assert held < (energy + 1e-5) * total


@pytest.mark.parametrize("reference", REFERENCES)
def test_both_verdicts_occur(reference):
    rows = rows_of(400, 13, decay=0.5)
    verdicts = [Basis(D_IN).is_decided(sketch_of(rows, 8), energy, reference) for energy in (0.05, 0.5, 0.99, 1.0)]
    assert verdicts[0] and not verdicts[-1]
    assert verdicts == sorted(verdicts, reverse=True), "a higher threshold is never easier"


@pytest.mark.parametrize("reference", REFERENCES)
@QUICK
@given(st.integers(1, 90), st.integers(0, 20), st.floats(0.0, 0.9999), st.integers(D_IN, 2 * D_IN), st.integers(0, 99))
def test_a_sketch_as_wide_as_the_rows_is_always_decided(reference, n, kept, energy, size, seed):
    assert basis_of(kept, seed).is_decided(sketch_of(rows_of(n, seed + 1), size), energy, reference)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_sketch_as_wide_as_the_rows_is_decided_even_at_full_energy(reference):
    """It loses nothing but rounding, and what is left of a threshold after that is no reason for a second pass."""
    verdicts = [
        basis_of(kept, seed).is_decided(sketch_of(rows_of(n, seed + 1), D_IN), 1.0, reference)
        for seed, n, kept in itertools.product(range(10), (20, 25, 90), (0, 5, 20))
    ]
    assert len(verdicts) == 90 and all(verdicts)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_basis_of_the_whole_space_leaves_nothing_to_decide(reference):
    for seed in range(10):
        assert basis_of(D_IN, seed).is_decided(sketch_of(rows_of(60, seed + 1), D_IN), 0.5, reference)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_sketch_that_holds_every_row_is_always_decided(reference):
    assert basis_of(5, 1).is_decided(sketch_of(rows_of(6, 2), 6), 1.0, reference)
    assert basis_of(5, 1).is_decided(sketch_of(torch.zeros(50, D_IN), 4), 1.0, reference)


def test_asking_changes_neither_basis_nor_sketch():
    basis, rows = basis_of(5, 3), rows_of(100, 4)
    asked, unasked = sketch_of(rows, 8), sketch_of(rows, 8)
    before = basis.columns.clone()
    basis.is_decided(asked, 0.9)
    assert torch.equal(basis.columns, before)
    more = rows_of(30, 5)
    asked.update(more)
    unasked.update(more)
    assert torch.equal(asked.sketch, unasked.sketch)


def test_what_cannot_be_asked_is_refused():
    sketch = sketch_of(rows_of(30, 6), 4)
    with pytest.raises(ValueError, match="reference"):
        Basis(D_IN).is_decided(sketch, 0.9, "all")
    with pytest.raises(ValueError, match="energy"):
        Basis(D_IN).is_decided(sketch, 1.5)
    with pytest.raises(ValueError, match=f"{D_IN + 1}"):
        Basis(D_IN + 1).is_decided(sketch, 0.9)


# -- coarser columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_only_the_last_columns_are_rounded_as_a_file_of_that_dtype_would(dtype, count):
    basis = basis_of(9, 7)
    before = basis.columns.clone()
    basis.round_last(count, dtype)
    first = 9 - count
    assert torch.equal(basis.columns[:, :first], before[:, :first])
    assert torch.equal(basis.columns[:, first:], before[:, first:].to(dtype).float())
    assert basis.columns.dtype == torch.float32 and basis.rank == 9
    once = basis.columns.clone()
    basis.round_last(count, dtype)
    assert torch.equal(basis.columns, once)


def test_rounding_to_float32_changes_nothing():
    basis = basis_of(9, 8)
    before = basis.columns.clone()
    basis.round_last(9, torch.float32)
    assert torch.equal(basis.columns, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_columns_are_orthonormal_again_when_read_and_span_the_same(dtype):
    """[3]"""
    basis = basis_of(9, 9)
    exact = basis.columns.double().numpy()
    basis.round_last(9, dtype)
    assert gram_error(basis) > 1e-5, "rounding must be visible for the test to mean anything"
    read = Basis.from_columns(basis.columns.to(dtype))
    assert gram_error(read) < 1e-5
    assert subspace.projector_difference(read.columns.double().numpy(), exact) < 2e-2
