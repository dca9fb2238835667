"""Running sums: one pass equals merged shards, in any order; the sketch is linear in the gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis, GradientAccumulator, GradientSketch, MomentAccumulator

QUICK = settings(max_examples=30, deadline=None)
D_OUT, D_IN, WIDTH = 7, 10, 6
KINDS = {
    "moments": lambda dtype: MomentAccumulator(D_IN, dtype=dtype),
    "gradient": lambda dtype: GradientAccumulator(D_OUT, D_IN, dtype=dtype),
    "sketch": lambda dtype: GradientSketch(D_OUT, D_IN, WIDTH, seed=5, dtype=dtype),
}


def batch(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D_OUT, generator=generator), torch.randn(n, D_IN, generator=generator)


def feed(accumulator, grad_output, inputs):
    if isinstance(accumulator, MomentAccumulator):
        accumulator.update(inputs)
    else:
        accumulator.update(grad_output, inputs)
        accumulator.count_samples(1)
    return accumulator


def value(accumulator):
    return accumulator.tensors()[0]


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_merged_shards_in_any_order_equal_one_pass(kind, sizes, order):
    batches = [batch(n, seed) for seed, n in enumerate(sizes)]
    whole = KINDS[kind](torch.float64)
    for one in batches:
        feed(whole, *one)
    shards = [feed(KINDS[kind](torch.float64), *one) for one in batches]
    order.shuffle(shards)
    merged = KINDS[kind](torch.float64)
    for shard in shards:
        merged.merge(shard)
    assert merged.count == whole.count
    for left, right in zip(merged.tensors(), whole.tensors(), strict=True):
        assert torch.allclose(left, right, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_summing_tensors_in_place_equals_merging(kind):
    one, other = (feed(KINDS[kind](torch.float32), *batch(6, seed)) for seed in (1, 2))
    merged = KINDS[kind](torch.float32)
    merged.merge(one)
    merged.merge(other)
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        mine.add_(theirs)
    assert one.count == merged.count
    assert torch.equal(value(one), value(merged))


def test_moments_energy_and_count_are_those_of_the_rows():
    _, inputs = batch(50, 3)
    moments = MomentAccumulator(D_IN)
    for part in inputs.split(7):
        moments.update(part)
    assert torch.allclose(moments.moments, inputs.mT @ inputs, atol=1e-4)
    assert moments.moments.dtype == torch.float32
    assert moments.total_energy == pytest.approx(float(inputs.double().square().sum()), rel=1e-12)
    assert moments.count == 50
    assert (MomentAccumulator(4).count, MomentAccumulator(4).total_energy) == (0, 0.0)


def test_growing_from_moments_does_not_depend_on_the_order_of_batches():
    batches = [batch(9, seed)[1] for seed in range(6)]
    bases = []
    for ordered in (batches, batches[::-1]):
        moments = MomentAccumulator(D_IN)
        for rows in ordered:
            moments.update(rows)
        bases.append(Basis(D_IN))
        bases[-1].grow(moments, 0.7)
    assert bases[0].rank == bases[1].rank > 0
    assert torch.allclose(bases[0].columns, bases[1].columns, atol=1e-4)


def test_mean_gradient_is_that_of_autograd():
    grad_output, inputs = batch(12, 4)
    weight = torch.zeros(D_OUT, D_IN, requires_grad=True)
    ((inputs @ weight.mT) * grad_output).sum().backward()
    gradient = GradientAccumulator(D_OUT, D_IN)
    gradient.update(grad_output[:5], inputs[:5])
    gradient.update(grad_output[5:], inputs[5:])
    gradient.count_samples(3)
    gradient.count_samples(1)
    assert torch.allclose(gradient.mean, weight.grad / 4, atol=1e-6)


def test_sketch_is_the_gradient_times_a_fixed_normal_matrix():
    grad_output, inputs = batch(12, 5)
    sketch = feed(KINDS["sketch"](torch.float64), grad_output, inputs)
    test_matrix = torch.randn(D_OUT, WIDTH, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(sketch.sketch, ((grad_output.mT @ inputs).mT @ test_matrix).double(), atol=1e-5)
    tripled = feed(KINDS["sketch"](torch.float64), 3 * grad_output, inputs)
    assert torch.allclose(tripled.sketch, 3 * sketch.sketch, atol=1e-5)


def test_sketch_energy_estimates_the_gradient_energy():
    grad_output, inputs = batch(30, 6)
    sketch = GradientSketch(D_OUT, D_IN, 4000, seed=1)
    sketch.update(grad_output, inputs)
    exact = float((grad_output.mT @ inputs).square().sum())
    assert float(sketch.sketch.square().sum()) / 4000 == pytest.approx(exact, rel=0.1)


def test_equal_seeds_give_equal_sketches_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    one, other, third = (GradientSketch(D_OUT, D_IN, WIDTH, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    for sketch in (one, other, third):
        feed(sketch, *batch(4, 7))
    assert torch.equal(one.sketch, other.sketch)
    assert not torch.allclose(one.sketch, third.sketch)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rows_count_with_their_exact_values(kind):
    grad_output, inputs = (part.bfloat16() for part in batch(200, 8))
    half = feed(KINDS[kind](torch.float32), grad_output, inputs)
    full = feed(KINDS[kind](torch.float64), grad_output.double(), inputs.double())
    assert torch.allclose(value(half).double(), value(full), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_exact_inside_autocast_and_carry_no_graph(kind):
    grad_output, inputs = (part.requires_grad_() for part in batch(40, 9))
    plain = feed(KINDS[kind](torch.float32), grad_output, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = feed(KINDS[kind](torch.float32), grad_output, inputs)
    assert torch.equal(value(plain), value(inside))
    assert not value(plain).requires_grad


def test_the_matmul_precision_chosen_outside_is_restored():
    torch.set_float32_matmul_precision("high")
    try:
        feed(KINDS["moments"](torch.float32), *batch(4, 10))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_refused_and_change_nothing(kind):
    accumulator = feed(KINDS[kind](torch.float32), *batch(3, 11))
    before = [tensor.clone() for tensor in accumulator.tensors()]
    grad_output, inputs = batch(3, 12)
    broken = inputs.clone()
    broken[0, 0] = float("inf")
    with pytest.raises(ValueError, match="must be finite, got 1 "):
        feed(accumulator, grad_output, broken)
    with pytest.raises(ValueError, match=r"must have shape .*, got \(3, 9\)"):
        feed(accumulator, grad_output, inputs[:, 1:])
    with pytest.raises(ValueError, match="must have shape"):
        feed(accumulator, grad_output, inputs[None])
    for left, right in zip(before, accumulator.tensors(), strict=True):
        assert torch.equal(left, right)


def test_gradient_rows_must_pair_up():
    for kind in ("gradient", "sketch"):
        with pytest.raises(ValueError, match=r"inputs must have shape \(3, 10\), got \(2, 10\)"):
            KINDS[kind](torch.float32).update(torch.randn(3, D_OUT), torch.randn(2, D_IN))
        with pytest.raises(ValueError, match="grad_output must have shape"):
            KINDS[kind](torch.float32).update(torch.randn(3, D_IN), torch.randn(3, D_IN))


def test_unlike_accumulators_are_not_merged():
    with pytest.raises(ValueError, match="same seed, got 1 and 2"):
        GradientSketch(D_OUT, D_IN, WIDTH, 1).merge(GradientSketch(D_OUT, D_IN, WIDTH, 2))
    with pytest.raises(ValueError, match="only a MomentAccumulator can be merged here, got GradientAccumulator"):
        MomentAccumulator(D_IN).merge(GradientAccumulator(D_IN, D_IN))
    with pytest.raises(ValueError, match="agree in shape and dtype"):
        MomentAccumulator(D_IN).merge(MomentAccumulator(D_IN + 1))
    with pytest.raises(ValueError, match="agree in shape and dtype"):
        MomentAccumulator(D_IN).merge(MomentAccumulator(D_IN, dtype=torch.float64))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"dtype of a running sum must be torch.float32 or torch.float64, got torch.b"):
        MomentAccumulator(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="width must be a whole number of at least 1, got 0"):
        GradientSketch(4, 4, 0, seed=1)
    with pytest.raises(ValueError, match="at least 1 counted sample, got 0"):
        _ = GradientAccumulator(4, 4).mean
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 0, got -1"):
        GradientAccumulator(4, 4).count_samples(-1)
