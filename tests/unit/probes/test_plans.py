"""How passes over data sum up: sketched or exact, by memory, and over which tokens; on a tiny model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mllm_keeplora.linalg import FrequentDirections, GradientAccumulator, GradientSketch, MomentAccumulator
from mllm_keeplora.probes.features import collect_moments
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.plans import FeaturePlan, GradientPlan
from tests.oracles import tokens as oracle
from tests.support.keeplora import modules_of
from tests.unit.conftest import captured_tokens, encode

NUM_RECORDS, PATCHES = 6, 4
ALL_LAYERS = 16


@pytest.fixture(scope="module")
def base(new_base):
    """Passes leave nothing behind, so that one model serves all tests here."""
    return new_base()


@pytest.fixture(scope="module")
def batches(base, tiny_records):
    """Six records of unequal length in padded batches of two and four."""
    records = tiny_records["Alpha"][:NUM_RECORDS]
    made = [encode(base, records[:2]), encode(base, records[2:])]
    assert not all(bool(batch["attention_mask"].all()) for batch in made)
    return made


@pytest.fixture(scope="module")
def samples(base, tiny_records):
    """The same records, one by one."""
    return [encode(base, [record]) for record in tiny_records["Alpha"][:NUM_RECORDS]]


@pytest.fixture(scope="module")
def features(base, samples):
    """Inputs of every layer for every sample, a list of (t, d_in) by layer, seen by plain hooks."""
    each = [captured_tokens(base.model, modules_of(base), [sample]) for sample in samples]
    return {layer: [one[layer] for one in each] for layer in modules_of(base)}


@pytest.fixture(scope="module")
def exact_gradients(base, batches):
    return collect_mean_gradients(base.family, base.model, modules_of(base), batches)


def image_token(base):
    return base.model.config.image_token_id


def kinds(base, samples):
    """Kind -> positions, for every sample; every kind occurs and every sample has four patches."""
    lists = [[sample[key][0].tolist() for sample in samples] for key in ("input_ids", "labels", "attention_mask")]
    found = oracle.positions_by_kind(*lists, image_token(base))
    assert all(len(positions[oracle.IMAGE]) == PATCHES for positions in found)
    assert all(positions[kind] for positions in found for kind in positions)
    return found


def is_projector(layer):
    return "multi_modal_projector" in layer


def collect(base, batches, **settings):
    return collect_moments(base.family, base.model, modules_of(base), batches, FeaturePlan(**settings))


def gradients(base, batches, **settings):
    return collect_mean_gradients(base.family, base.model, modules_of(base), batches, GradientPlan(**settings))


def close(found, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    return np.abs(np.asarray(found, dtype=np.float64) - expected).max() <= tolerance * np.abs(expected).max()


# -- sketches of features --------------------------------------------------------------------------------------------


def test_a_sketch_of_features_bounds_the_exact_moments_along_every_direction(base, batches, features):
    size = 6
    sketches = collect(base, batches, statistic="sketch", size=size)
    assert len(sketches) == ALL_LAYERS
    lossy = 0
    for layer, sketch in sketches.items():
        rows = np.concatenate(features[layer])
        assert isinstance(sketch, FrequentDirections) and sketch.sketch.shape[0] <= size
        assert sketch.count == len(rows)
        assert sketch.total_energy == pytest.approx((rows**2).sum(), rel=1e-5)
        kept = sketch.sketch.double().numpy()
        gap = np.linalg.eigvalsh(rows.T @ rows - kept.T @ kept)
        squares = np.linalg.svd(rows, compute_uv=False) ** 2
        bound = min(squares[k:].sum() / (size - k) for k in range(size))
        assert -1e-5 * squares.sum() < gap[0] and gap[-1] <= bound + 1e-5 * squares.sum()
        lossy += sketch.shrunken_energy > 1e-3 * sketch.total_energy
    assert lossy == ALL_LAYERS


def test_a_sketch_as_wide_as_the_features_is_as_good_as_moments(base, batches, features):
    for layer, found in collect(base, batches, statistic="sketch", size=64).items():
        rows = np.concatenate(features[layer])
        gram = found.sketch.mT @ found.sketch if isinstance(found, FrequentDirections) else found.moments
        assert close(gram, rows.T @ rows)


def test_sketched_layers_that_are_fed_the_same_tensor_share_one_object(base, batches):
    sketches = collect(base, batches, statistic="sketch", size=6)
    assert len({id(sketch) for sketch in sketches.values()}) == 2 * 4 + 2


def test_features_are_sketched_when_memory_is_short_and_exact_when_it_is_plenty(base, batches):
    for memory_gb, kind in ((1e-9, FrequentDirections), (64.0, MomentAccumulator)):
        found = collect(base, batches, statistic="auto", size=6, memory_gb=memory_gb)
        assert len(found) == ALL_LAYERS and {type(each) for each in found.values()} == {kind}


@pytest.mark.parametrize("statistic", ["exact", "sketch"])
def test_a_named_statistic_does_not_look_at_memory(base, batches, statistic):
    kind = {"exact": MomentAccumulator, "sketch": FrequentDirections}[statistic]
    for memory_gb in (1e-9, 64.0):
        found = collect(base, batches, statistic=statistic, size=6, memory_gb=memory_gb)
        assert {type(each) for each in found.values()} == {kind}


def test_memory_decides_by_the_size_of_all_moments_together():
    cpu, widths = torch.device("cpu"), [1000] * 10
    needed_gb = 10 * 1000**2 * 8 / 1e9  # moments are float64 on a CPU, gradients float32
    assert not FeaturePlan("auto", memory_gb=0.9 * needed_gb).exact(widths, cpu)
    assert FeaturePlan("auto", memory_gb=1.2 * needed_gb).exact(widths, cpu)
    sizes = {str(number): (1000, 1000) for number in range(10)}
    assert not GradientPlan("auto", memory_gb=0.45 * needed_gb).exact(sizes)
    assert GradientPlan("auto", memory_gb=0.6 * needed_gb).exact(sizes)


# -- sketches of gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "seed"), [(8, 0), (16, 7)])
def test_a_sketch_of_a_gradient_is_the_exact_one_times_a_fixed_normal_matrix(
    base, batches, exact_gradients, width, seed
):
    sketches = gradients(base, batches, statistic="sketch", width=width, seed=seed)
    assert list(sketches) == list(exact_gradients) and len(sketches) == ALL_LAYERS
    for layer, sketch in sketches.items():
        mean = exact_gradients[layer].mean.double().numpy()
        normal = torch.randn(len(mean), width, generator=torch.Generator().manual_seed(seed)).double().numpy()
        assert isinstance(sketch, GradientSketch) and sketch.count == NUM_RECORDS
        assert close(sketch.sketch / NUM_RECORDS, mean.T @ normal, 1e-4)


def test_a_sketch_is_taken_only_where_it_is_smaller_than_the_gradient(base, batches):
    for layer, found in gradients(base, batches, statistic="sketch", width=40).items():
        d_out = base.model.get_submodule(layer).out_features
        assert d_out in (32, 48)
        assert type(found) is (GradientSketch if d_out > 40 else GradientAccumulator)


def test_gradients_are_sketched_when_memory_is_short_and_exact_when_it_is_plenty(base, batches, exact_gradients):
    for memory_gb, kind in ((1e-9, GradientSketch), (64.0, GradientAccumulator)):
        found = gradients(base, batches, statistic="auto", width=8, memory_gb=memory_gb)
        assert len(found) == ALL_LAYERS and {type(each) for each in found.values()} == {kind}
    for layer, accumulator in found.items():
        assert torch.equal(accumulator.mean, exact_gradients[layer].mean)


@pytest.mark.parametrize("parts", [(6,), (1, 5), (3, 3)])
def test_sketches_do_not_depend_on_the_batches(base, batches, tiny_records, parts):
    """[17]"""
    ends = [0, *itertools.accumulate(parts)]
    records = tiny_records["Alpha"]
    others = [encode(base, records[a:b]) for a, b in itertools.pairwise(ends)]
    one, other = (gradients(base, each, statistic="sketch", width=8, seed=3) for each in (batches, others))
    for layer in one:
        assert close(other[layer].sketch, one[layer].sketch, 1e-4)


def test_a_following_sketch_captures_more_than_one_along_random_directions(base, batches, exact_gradients):
    from mllm_keeplora.linalg import Basis, gradient_capture, top_residual_directions

    captured = {}
    for following in (True, False):
        found = gradients(base, batches, statistic="sketch", width=8, following=following)
        captured[following] = []
        for layer, each in found.items():
            basis = Basis(each.d_in)
            A = top_residual_directions(each, basis, 4)
            captured[following].append(gradient_capture(exact_gradients[layer], basis, A)["captured"])
    assert np.mean(captured[True]) > np.mean(captured[False])
    assert min(captured[True]) > min(captured[False])


# -- which tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budgets",
    [
        {"image": 1},
        {"image": 3, "instruction": 2, "answer": 1},
        {"instruction": 4},
        {"answer": 0},
        {"image": 0, "instruction": 1},
        {"image": 99, "instruction": 99, "answer": 99},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("statistic", ["exact", "sketch"])
def test_every_sample_counts_no_more_tokens_of_a_kind_than_its_budget(base, batches, samples, budgets, statistic):
    found = collect(base, batches, statistic=statistic, size=6, tokens=budgets)
    in_language = sum(oracle.num_chosen(positions, budgets) for positions in kinds(base, samples))
    in_projector = NUM_RECORDS * min(PATCHES, budgets.get("image", PATCHES))
    assert len(found) == ALL_LAYERS
    for layer, accumulator in found.items():
        assert accumulator.count == (in_projector if is_projector(layer) else in_language)


def test_without_budgets_every_real_token_counts(base, batches, samples):
    everything = sum(int(sample["attention_mask"].sum()) for sample in samples)
    for layer, accumulator in collect(base, batches, tokens=None).items():
        assert accumulator.count == (NUM_RECORDS * PATCHES if is_projector(layer) else everything)


@pytest.mark.parametrize("kind", [oracle.IMAGE, oracle.INSTRUCTION, oracle.ANSWER])
def test_a_kind_that_is_left_alone_counts_with_all_its_tokens_and_no_other(base, batches, samples, features, kind):
    budgets = {other: 0 for other in (oracle.IMAGE, oracle.INSTRUCTION, oracle.ANSWER) if other != kind}
    found, positions = collect(base, batches, tokens=budgets), kinds(base, samples)
    for layer, accumulator in found.items():
        if is_projector(layer):
            rows = np.concatenate(features[layer])[: None if kind == oracle.IMAGE else 0]
        else:
            rows = np.concatenate([rows[of[kind]] for rows, of in zip(features[layer], positions, strict=True)])
        assert accumulator.count == len(rows)
        assert close(accumulator.moments, rows.T @ rows)


def test_padding_never_counts_whatever_its_side_token_and_label(base, tiny_records, samples):
    right = encode(base, tiny_records["Alpha"][:NUM_RECORDS])
    answer = int(right["labels"][right["labels"] != -100][0])
    budgets = {"image": 2, "instruction": 5, "answer": 1}
    expected = sum(oracle.num_chosen(positions, budgets) for positions in kinds(base, samples))
    for left, fill in itertools.product((False, True), (20, answer)):
        batch = {key: value.clone() for key, value in right.items()}
        for row, length in enumerate(right["attention_mask"].sum(1).tolist()):
            place = slice(-length, None) if left else slice(length)
            for key, value in (("input_ids", fill), ("labels", fill), ("attention_mask", 0)):
                batch[key][row] = value
                batch[key][row, place] = right[key][row, :length]
        for layer, accumulator in collect(base, [batch], tokens=budgets).items():
            assert accumulator.count == (NUM_RECORDS * 2 if is_projector(layer) else expected)


# -- normalised tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budgets", [None, {"image": 1, "instruction": 3}])
def test_normalised_tokens_carry_the_energy_of_their_number(base, batches, budgets):
    for statistic in ("exact", "sketch"):
        found = collect(base, batches, statistic=statistic, size=6, tokens=budgets, normalise=True)
        plain = collect(base, batches, statistic=statistic, size=6, tokens=budgets)
        for layer, accumulator in found.items():
            assert accumulator.count == plain[layer].count
            assert accumulator.total_energy == pytest.approx(accumulator.count, rel=1e-5)
            assert plain[layer].total_energy != pytest.approx(accumulator.count, rel=1e-2)


def test_moments_of_normalised_tokens_are_those_of_every_token_over_its_length(base, batches, features):
    for layer, accumulator in collect(base, batches, normalise=True).items():
        rows = np.concatenate(features[layer])
        rows = np.stack([row / np.sqrt(sum(value * value for value in row)) for row in rows])
        assert close(accumulator.moments, rows.T @ rows)
