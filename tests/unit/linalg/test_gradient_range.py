"""The sketch whose directions follow the gradient: what it holds, what it captures, how shares of it come together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis, GradientRange, GradientSketch, gradient_capture, top_residual_directions

D_OUT, D_IN, ROWS = 48, 40, 30


def stream(seed: int, batches: int, rank: int, noise: float = 0.05) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of rows whose gradients share `rank` strong directions, each batch in its own mixture, beside noise."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(D_OUT, rank, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(D_IN, rank, generator=generator))[0]
    found = []
    for _ in range(batches):
        common = torch.randn(ROWS, rank, generator=generator)
        weights = torch.rand(rank, generator=generator) + 0.2
        grad_output = common * weights @ left.mT + noise * torch.randn(ROWS, D_OUT, generator=generator)
        found.append((grad_output, common @ right.mT + noise * torch.randn(ROWS, D_IN, generator=generator)))
    return found


def exact(rows: list) -> torch.Tensor:
    return sum(grad_output.double().mT @ inputs.double() for grad_output, inputs in rows)


def sketched(rows: list, width: int, kind: type = GradientRange) -> GradientSketch:
    sketch = kind(D_OUT, D_IN, width, seed=0)
    for grad_output, inputs in rows:
        sketch.update(grad_output, inputs)
        sketch.count_samples(1)
    return sketch


def captured(sketch: GradientSketch, gradient: torch.Tensor, rank: int) -> float:
    """Share of the best A's energy that the sketch's A has, on the exact gradient."""
    basis = Basis(D_IN)
    best, found = (
        gradient_capture(gradient, basis, top_residual_directions(source, basis, rank))["captured"]
        for source in (gradient, sketch)
    )
    return found / best


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), batches=st.integers(1, 12))
def test_directions_stay_orthonormal_and_never_hold_more_than_the_gradient(seed, batches):
    rows = stream(seed, batches, rank=5)
    sketch = sketched(rows, 12)
    directions = sketch.test_matrix.double()
    assert (directions.mT @ directions - torch.eye(12)).abs().max() < 3e-2
    assert sketch.sketch.double().square().sum() <= 1.02 * exact(rows).square().sum()
    assert sketch.count == batches


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), batches=st.integers(1, 12))
def test_a_gradient_of_low_rank_is_held_whole(seed, batches):
    rows = stream(seed, batches, rank=4, noise=0.0)
    held = sketched(rows, 12)
    gradient = held.test_matrix.double() @ held.sketch.double().mT
    assert (gradient - exact(rows)).norm() < 2e-2 * exact(rows).norm()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_it_captures_what_a_later_batch_brings(seed):
    """The second half of the stream knows directions that the first does not have."""
    rows = stream(seed, 4, rank=3) + stream(seed + 20_000, 4, rank=3)
    assert captured(sketched(rows, 18), exact(rows), 6) > 0.95


def test_at_half_the_width_it_captures_more_than_random_directions():
    shares = {}
    for kind, width in ((GradientRange, 12), (GradientSketch, 24)):
        streams = [stream(seed, 8, rank=6, noise=0.5) for seed in range(10)]
        shares[kind] = sum(captured(sketched(rows, width, kind), exact(rows), 4) for rows in streams) / 10
    assert shares[GradientRange] > shares[GradientSketch]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 7))
def test_two_ranges_merge_to_about_that_of_the_whole(seed, cut):
    rows = stream(seed, 8, rank=5)
    one, other = sketched(rows[:cut], 15), sketched(rows[cut:], 15)
    one.merge(other)
    assert one.count == 8
    assert captured(one, exact(rows), 5) > 0.99


def test_one_that_saw_nothing_merges_as_nothing():
    rows = stream(0, 4, rank=5)
    empty, full = GradientRange(D_OUT, D_IN, 15, seed=0), sketched(rows, 15)
    empty.merge(sketched(rows, 15))
    assert torch.allclose(
        empty.sketch @ empty.test_matrix.float().mT,
        full.sketch @ full.test_matrix.float().mT,
        atol=0.05 * full.sketch.norm(),
    )


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_narrowest_sketches_hold_the_leading_direction(width):
    rows = stream(3, 6, rank=1)
    assert captured(sketched(rows, width), exact(rows), 1) > 0.95


def test_gradients_that_are_zero_give_zeros():
    sketch = GradientRange(D_OUT, D_IN, 12, seed=0)
    for _ in range(3):
        sketch.update(torch.zeros(5, D_OUT), torch.randn(5, D_IN))
    assert not sketch.sketch.any()
    rows = stream(1, 3, rank=4, noise=0.0)
    for grad_output, inputs in rows:
        sketch.update(grad_output, inputs)
    assert captured(sketch, exact(rows), 4) > 0.9


def test_values_that_are_not_finite_and_wrong_partners_are_refused():
    sketch = GradientRange(D_OUT, D_IN, 12, seed=0)
    with pytest.raises(ValueError, match="finite"):
        sketch.update(torch.full((3, D_OUT), torch.nan), torch.zeros(3, D_IN))
    with pytest.raises(ValueError, match="only a GradientRange"):
        sketch.merge(GradientSketch(D_OUT, D_IN, 12, seed=0))
    with pytest.raises(ValueError, match="agree in shape and seed"):
        sketch.merge(GradientRange(D_OUT, D_IN, 12, seed=1))
