"""The feature sketch: its bound, exactness of small streams, merging."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import FrequentDirections

QUICK = settings(max_examples=40, deadline=None)


def rows_of(n, d_in, seed, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator)
    return torch.randn(n, d_in, generator=generator) * torch.logspace(0, -decay, d_in) @ mixing


def assert_bound(rows, sketch, size):
    rows, kept = rows.double(), sketch.double()
    gap = torch.linalg.eigvalsh(rows.mT @ rows - kept.mT @ kept)
    squares = torch.linalg.svdvals(rows).square()
    slack = 1e-5 * float(squares.sum())
    bound = min(float(squares[k:].sum()) / (size - k) for k in range(size))
    assert float(gap[0]) >= -slack
    assert float(gap[-1]) <= bound + slack


@QUICK
@given(st.integers(1, 80), st.integers(2, 16), st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_sketch_bounds_the_stream_in_every_direction(n, d_in, size, chunk, seed):
    rows = rows_of(n, d_in, seed)
    sketch = FrequentDirections(d_in, size)
    for part in rows.split(chunk):
        sketch.update(part)
    assert sketch.sketch.shape[0] <= size
    assert sketch.count == n
    assert_bound(rows, sketch.sketch, size)
    total = float(rows.double().square().sum())
    assert sketch.total_energy == pytest.approx(total, rel=1e-9)
    kept = float(sketch.sketch.double().square().sum())
    assert sketch.shrunken_energy == pytest.approx(total - kept, abs=1e-5 * total)


@QUICK
@given(st.lists(st.integers(0, 40), min_size=2, max_size=4), st.integers(1, 8), st.integers(0, 99))
def test_merged_sketches_keep_the_bound_of_the_whole_stream(sizes, size, seed):
    parts = [rows_of(n, 10, seed + i) for i, n in enumerate(sizes)]
    merged = FrequentDirections(10, size)
    for part in parts:
        other = FrequentDirections(10, size)
        other.update(part)
        merged.merge(other)
    rows = torch.cat(parts)
    assert merged.count == rows.shape[0]
    assert merged.total_energy == pytest.approx(float(rows.double().square().sum()), rel=1e-9)
    if rows.shape[0]:
        assert_bound(rows, merged.sketch, size)


def test_few_rows_or_a_wide_sketch_lose_nothing():
    few = rows_of(6, 20, 1)
    sketch = FrequentDirections(20, 6)
    sketch.update(few)
    assert torch.equal(sketch.sketch, few)
    many = rows_of(500, 8, 2)
    sketch = FrequentDirections(8, 8)
    sketch.update(many)
    assert torch.allclose(sketch.sketch.mT @ sketch.sketch, many.mT @ many, rtol=1e-4, atol=1e-2)
    assert sketch.shrunken_energy < 1e-5 * sketch.total_energy


def test_low_rank_streams_are_kept_exactly():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(300, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    sketch = FrequentDirections(30, 5)
    sketch.update(rows)
    assert torch.allclose(sketch.sketch.mT @ sketch.sketch, rows.mT @ rows, rtol=1e-3, atol=1e-2)


def test_reading_the_sketch_does_not_change_what_follows():
    rows = rows_of(60, 12, 4)
    read, unread = FrequentDirections(12, 4), FrequentDirections(12, 4)
    for part in rows.split(7):
        read.update(part)
        unread.update(part)
        _ = read.sketch, read.shrunken_energy
    assert torch.equal(read.sketch, unread.sketch)


def test_zero_and_half_precision_rows():
    sketch = FrequentDirections(5, 2)
    sketch.update(torch.zeros(20, 5))
    assert sketch.sketch.square().sum() == 0
    sketch.update(torch.ones(1, 5, dtype=torch.bfloat16))
    assert sketch.total_energy == pytest.approx(5.0)
    assert sketch.sketch.dtype == torch.float32
    assert sketch.shrunken_energy == pytest.approx(0.0, abs=1e-5)


def test_what_does_not_fit_is_refused():
    sketch = FrequentDirections(5, 2)
    with pytest.raises(ValueError, match=r"rows must have shape \(n, 5\), got \(3, 4\)"):
        sketch.update(torch.randn(3, 4))
    with pytest.raises(ValueError, match="rows must be finite"):
        sketch.update(torch.full((1, 5), float("nan")))
    with pytest.raises(ValueError, match=r"agree in \(d_in, size\), got \(5, 2\) and \(5, 3\)"):
        sketch.merge(FrequentDirections(5, 3))
    with pytest.raises(ValueError, match="only a FrequentDirections"):
        sketch.merge(torch.randn(2, 5))
    with pytest.raises(ValueError, match="size must be"):
        FrequentDirections(5, 0)
    assert (sketch.count, sketch.total_energy) == (0, 0.0)
