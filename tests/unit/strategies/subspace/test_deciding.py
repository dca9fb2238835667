"""Statistics that decide: sketches where they are enough, exact moments of the others in as little memory."""

import pytest
import torch

from mllm_keeplora.adapters import adapters_for
from mllm_keeplora.linalg import FrequentDirections, MomentAccumulator
from mllm_keeplora.probes.plans import FeaturePlan
from mllm_keeplora.strategies.subspace.deciding import decided_features
from tests.support.strategies import context_of

PLAN = FeaturePlan("sketch", 4)


@pytest.fixture
def context(base, tiny_records):
    return context_of(base, adapters_for(base, "keeplora", "auto"), {"Alpha": tiny_records["Alpha"][:6]}, 0)


def parts_of(context, decides) -> list[dict]:
    """Copies: a part is emptied when the next is asked for."""
    return [dict(part) for part in decided_features(context, 6, PLAN, decides)]


def test_what_every_sketch_decides_is_looked_at_once(context):
    [part] = parts_of(context, lambda layer, sketch: True)
    assert list(part) == list(context.layers.names)
    assert all(isinstance(each, FrequentDirections) for each in part.values())


def test_each_layer_is_in_one_part_and_those_undecided_have_exact_moments(context):
    undecided = [layer for layer in context.layers.names if "self_attn" in layer or "projector" in layer]
    first, *others = parts_of(context, lambda layer, sketch: layer not in undecided)
    assert first.keys() == set(context.layers.names) - set(undecided)
    assert [layer for part in others for layer in part] == undecided
    exact = context.passes.features(6)
    for part in others:
        for layer, moments in part.items():
            assert isinstance(moments, MomentAccumulator)
            assert torch.equal(moments.tensors()[0], exact[layer].tensors()[0])


def test_a_part_is_emptied_when_the_next_is_asked_for(context):
    parts = decided_features(context, 6, PLAN, lambda layer, sketch: False)
    held = [next(parts), next(parts)]
    assert held[0] == {} and held[1]
    list(parts)
    assert held[1] == {}


def test_exact_moments_that_do_not_fit_come_in_passes(context):
    """Under `auto`: of what fits in eight passes none is sketched, of what does not all."""
    total = sum(8 * context.layers.d_in(group[0]) ** 2 for group in context.layers.groups())
    exact = context.passes.features(6)
    for share, passes in ((1.01, 1), (0.5, 2), (0.1, None)):
        plan = FeaturePlan("auto", 4, memory_gb=share * total / 1e9)
        parts = [dict(part) for part in decided_features(context, 6, plan, lambda layer, sketch: True)]
        found = {layer: each for part in parts for layer, each in part.items()}
        assert found.keys() == set(context.layers.names)
        assert len(parts) == (passes or 1)
        for layer, each in found.items():
            assert isinstance(each, MomentAccumulator if passes else FrequentDirections)
            assert not passes or torch.equal(each.tensors()[0], exact[layer].tensors()[0])


@pytest.mark.parametrize("statistic", ["exact", "sketch"])
def test_what_is_asked_for_outright_comes_in_one_pass(context, statistic):
    assert context.passes.rounds(FeaturePlan(statistic, 4, memory_gb=1e-9)) is None


def test_rounds_take_no_more_than_the_sketches_did_and_keep_shared_inputs_together():
    """Sketches of 8 float32 rows of 100 are 3,200 bytes each; exact float64 moments are 80,000."""
    sketches = {name: FrequentDirections(100, 4) for name in "abcd"}
    layers = {"q": sketches["a"], "k": sketches["a"], "o": sketches["b"], "up": sketches["c"], "down": sketches["d"]}
    few = PLAN.exact_rounds(layers, list(layers.values()))
    assert few == [["q", "k"], ["o"], ["up"], ["down"]], "an input whose moments are too large comes alone"
    many = [*layers.values(), *(FrequentDirections(100, 4) for _ in range(46))]  # 50 inputs, 160,000 bytes
    assert PLAN.exact_rounds(layers, many) == [["q", "k", "o"], ["up", "down"]]
    assert PLAN.exact_rounds({}, many) == []
