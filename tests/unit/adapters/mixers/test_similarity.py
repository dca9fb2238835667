"""Weights by likeness against their float64 reference, and on a model: sums of deltas, a batch's company, no answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters.mixers import load_mixer, save_mixer
from mllm_keeplora.adapters.mixers.similarity import Similarity
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.models.causal.features import feature_sizes, prompt_features
from tests.oracles import similarity as oracle
from tests.unit.adapters.conftest import HISTORIES, adapt, random_factors
from tests.unit.conftest import encode, logits_of

WORDS, WIDTH = 5, 9
MODALITIES = ("text", "picture", "both")


def features(seed, count, scale=1.0):
    """Words all of one direction, as mean embeddings are; pictures of another size, and every third has none."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, WIDTH)) + np.array([4.0] * WORDS + [0.0] * (WIDTH - WORDS))
    rows[:, WORDS:] *= scale
    rows[2::3, WORDS:] = 0.0
    return rows.astype(np.float32)


def mixer_of(means, modality="both", temperature=0.3, **options):
    means = np.asarray(means, dtype=np.float32)
    mixer = Similarity(len(means), means.shape[1], WORDS, modality, temperature, **options)
    mixer.means.copy_(torch.tensor(means))
    return mixer


def halves(row):
    return row[:WORDS], row[WORDS:]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("top1", [True, False])
def test_weights_are_the_softmax_of_cosines(modality, centered, top1):
    """Two domains with pictures, one without; questions with and without."""
    means, asked = features(1, 3, scale=30.0), features(2, 12, scale=30.0)
    found = mixer_of(means, modality, centered=centered, top1=top1)(torch.tensor(asked)).double().numpy()
    anchors = [halves(row) for row in means]
    wanted = [oracle.weights(halves(row), anchors, modality, 0.3, centered, top1) for row in asked]
    assert np.allclose(found, wanted, atol=1e-5) and np.allclose(found.sum(axis=1), 1.0, atol=1e-6)
    assert np.ptp(found, axis=0).max() > 1e-2, "weights depend on the question"


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("centered", [True, False])
def test_equal_means_weigh_alike_up_to_rounding(modality, centered):
    """Rounding is not taken for a direction, which a center would leave alone of them."""
    noise = 1 + 1e-7 * np.random.default_rng(0).standard_normal((3, WIDTH))
    found = mixer_of(features(1, 1) * noise, modality, 0.05, centered=centered)(torch.tensor(features(2, 9)))
    assert torch.allclose(found, torch.full((9, 3), 1 / 3), atol=5e-3)


def test_a_single_domain_answers_whole_and_a_low_temperature_chooses_one():
    asked = torch.tensor(features(2, 9))
    assert torch.equal(mixer_of(features(1, 1))(asked), torch.ones(9, 1))
    means = features(3, 4)
    asked = torch.tensor(means.repeat(2, axis=0) + 0.1 * features(4, 8))
    cold, chosen = mixer_of(means, temperature=1e-4)(asked), mixer_of(means, top1=True)(asked)
    assert torch.allclose(cold, chosen, atol=1e-4) and chosen.any(dim=0).all()


def test_a_stored_mixer_is_the_same(tmp_path):
    mixer = mixer_of(features(1, 3), "picture", 0.2, centered=False, top1=True, layers=["a", "b"])
    save_mixer(tmp_path / "mixer.safetensors", mixer)
    loaded = load_mixer(tmp_path / "mixer.safetensors")
    assert loaded.settings() == mixer.settings() and len(mixer.settings()) == 8
    assert torch.equal(loaded.means, mixer.means) and not loaded.trained()


@pytest.mark.parametrize("count", [2, 5, 8])
def test_sums_of_factors_have_cross_terms_that_products_have_not(count):
    """The released reading of HiDe: for independent branches they are sqrt(T - 1) times what is wanted."""
    rng = np.random.default_rng(count)
    branches = [(rng.standard_normal((4, 60)), rng.standard_normal((50, 4)), 2.0) for _ in range(count)]
    products = oracle.weighed_delta(branches, np.ones(count))
    left = oracle.fused_by_sums(branches) - products
    assert np.allclose(left, oracle.cross_terms(branches))
    assert np.linalg.norm(left) / np.linalg.norm(products) == pytest.approx(np.sqrt(count - 1), rel=0.1)


# -- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tiny_records):
    """Questions of both domains in turn, one of them without a picture."""
    pairs = zip(*(tiny_records[name][:3] for name in tiny_records), strict=True)
    records = [record.first_exchange() for pair in pairs for record in pair]
    mute = replace(records[2], media=(), turns=(Turn("user", "red or green ?"), Turn("assistant", "green")))
    return [*records[:2], mute, *records[3:]]


def on(base, records, modality="both", **options):
    """A mixer whose domains are three questions, as this base sees them."""
    means = prompt_features(base.model, encode(base, records), modality != "text")
    mixer = Similarity(3, means.shape[1], feature_sizes(base.model)[0], modality, 0.3, **options)
    mixer.means.copy_(means[[0, 1, 3]])
    return mixer


def last_block(base):
    return [layer for layer in base.parts.target_layers if base.parts.depth(layer) == 1]


@pytest.mark.parametrize("mode", HISTORIES)
@pytest.mark.parametrize("weighed", ["all", "last"])
def test_a_question_is_answered_by_the_weighed_sum_of_deltas(base, asked, mode, weighed):
    """In every layer, or in those of the last block with all branches in full elsewhere: as dense weights answer."""
    adapters, branches = adapt(base, mode), [random_factors(base, seed) for seed in range(3)]
    batch, layers = encode(base, asked), None if weighed == "all" else last_block(base)
    mixer = on(base, asked, layers=layers)
    adapters.restore(branches, [], mixer)
    adapters.look_at(batch)
    found, weights, dense = logits_of(adapters.model, batch), mixer.weights.tolist(), adapt(base, mode)
    adapters.restore([], [])
    for row, own in enumerate(weights):
        by_layer = [
            {layer: weight if layers is None or layer in layers else 1.0 for layer in each.A}
            for weight, each in zip(own, branches, strict=True)
        ]
        for layer in branches[0].A:
            assert sum(each[layer] for each in by_layer) == pytest.approx(
                1.0 if layers is None or layer in layers else 3.0
            )
        dense.restore([replace(each, weight=part) for each, part in zip(branches, by_layer, strict=True)], [])
        assert torch.allclose(logits_of(dense.model, batch)[row], found[row], atol=2e-4)
        dense.restore([], [])
    assert np.ptp(weights, axis=0).max() > 0.1


@pytest.mark.parametrize("modality", MODALITIES)
def test_shuffling_a_batch_permutes_the_weights_and_nothing_else(base, asked, modality):
    mixer, adapters, order = on(base, asked, modality), adapt(base), [4, 2, 0, 5, 3, 1]
    adapters.restore([random_factors(base, seed) for seed in range(3)], [], mixer)
    adapters.look_at(encode(base, asked))
    weights = mixer.weights
    shuffled = encode(base, [asked[row] for row in order])
    adapters.look_at(shuffled)
    assert torch.allclose(mixer.weights, weights[order], atol=1e-6)
    anchors = [(row[: mixer.words].numpy(), row[mixer.words :].numpy()) for row in mixer.means]
    seen = prompt_features(base.model, shuffled).numpy()
    wanted = [
        oracle.weights((row[: mixer.words], row[mixer.words :]), anchors, modality, 0.3, centered=True) for row in seen
    ]
    assert np.allclose(mixer.weights.numpy(), wanted, atol=1e-4)


def test_an_answer_does_not_change_who_answers(base, asked):
    mixer, adapters = on(base, asked), adapt(base)
    adapters.restore([random_factors(base, seed) for seed in range(3)], [], mixer)
    adapters.look_at(encode(base, asked))
    weights = mixer.weights
    other = [replace(each, turns=(each.turns[0], Turn("assistant", "red red red blue yes"))) for each in asked]
    for batch in (encode(base, other), base.family.question_batch([replace(e, turns=e.turns[:1]) for e in asked])):
        adapters.look_at(batch)
        assert torch.allclose(mixer.weights, weights, atol=1e-6)


def test_answers_in_a_batch_are_those_of_each_question_alone(base, asked):
    adapters = adapt(base)
    adapters.restore([random_factors(base, seed, size=1.5) for seed in range(3)], [], on(base, asked))
    together = generate(base, adapters.model, asked, [""] * 6, 6)
    assert together == [generate(base, adapters.model, [each], [""], 6)[0] for each in asked]
    assert len({answer.text for answer in together}) > 1
