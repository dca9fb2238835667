"""Prototypes by themselves, against their float64 reference: start, logits, gradient, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters.prototypes import SCALE, ClassMeans, Prototypes
from mllm_keeplora.errors import UserError
from mllm_keeplora.system import files
from tests.oracles import dual as oracle

NAMES = ("ant", "bee", "cow")
LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0])
WIDTH = 5


def features_of(count=8, seed=0):
    """Of lengths between about 0.1 and 10, as images have them before they are compared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) * 10 ** torch.linspace(-1, 1, count)[:, None]


def begun(**scale) -> Prototypes:
    means = ClassMeans(len(NAMES), WIDTH)
    means.update(features_of(), LABELS)
    return means.prototypes(NAMES, "a digest", **scale)


def test_prototypes_start_at_the_means_of_their_classes_pictures():
    expected = oracle.class_prototypes(features_of().double().numpy(), LABELS.tolist(), len(NAMES))
    assert np.allclose(begun().P.detach().numpy(), expected, atol=1e-6)


def test_batches_and_processes_do_not_matter():
    """Two processes have unequal shares, which they sum up; one of them never sees a class."""
    whole, shares = begun(), [ClassMeans(len(NAMES), WIDTH) for _ in range(2)]
    for share, part in zip(shares, ([1, 3], [0, 2, 4, 5, 6, 7]), strict=True):
        for places in (part[:1], part[1:]):
            share.update(features_of()[places], LABELS[places])
    first, second = shares
    first.sums += second.sums
    first.counts += second.counts
    assert torch.allclose(first.prototypes(NAMES, "a digest").P, whole.P, atol=1e-7)


def test_a_class_without_a_picture_is_named():
    means = ClassMeans(3, WIDTH)
    means.update(features_of(2), torch.tensor([1, 1]))
    with pytest.raises(UserError, match=r"no training record shows 2 of 3 classes, first 'ant'; allowed: null, or"):
        means.prototypes(NAMES, "a digest")


def cosines(features, P, scale):
    """What prototypes add to logits of 0."""
    return np.stack([oracle.with_prototypes(np.zeros(len(P)), feature, P, scale) for feature in features])


@pytest.mark.parametrize("scale", [SCALE, 4.0])
def test_logits_are_scaled_cosines_whatever_the_lengths(scale):
    prototypes, seen = begun(scale=scale), features_of(4, seed=1)
    prototypes.P.data *= torch.tensor([[0.1], [1.0], [7.0]])  # a training does not keep them at unit length
    expected = cosines(seen.double().numpy(), prototypes.P.detach().double().numpy(), scale)
    assert np.allclose(prototypes.logits(seen).detach().numpy(), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prototypes(seen), prototypes.logits(seen))
        assert prototypes(seen.bfloat16()).dtype == torch.float32


def test_both_prototypes_and_features_get_their_gradient():
    prototypes, seen = begun(), features_of(4, seed=1).requires_grad_(True)

    def loss(P, features):
        P, features = P.reshape(3, WIDTH).tolist(), features.reshape(4, WIDTH).tolist()
        rows = torch.tensor(cosines(features, P, SCALE))
        return float(torch.nn.functional.cross_entropy(rows, torch.tensor([0, 1, 2, 0])))

    torch.nn.functional.cross_entropy(prototypes(seen), torch.tensor([0, 1, 2, 0])).backward()
    start = [prototypes.P.detach().double().flatten(), seen.detach().double().flatten()]
    for place, found in enumerate((prototypes.P.grad, seen.grad)):
        expected = []
        for number in range(found.numel()):
            losses = []
            for step in (1e-6, -1e-6):
                moved = [each.clone() for each in start]
                moved[place][number] += step
                losses.append(loss(*moved))
            expected.append((losses[0] - losses[1]) / 2e-6)
        assert np.allclose(found.flatten().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_a_file_gives_back_the_same_prototypes_and_says_whose_they_are(tmp_path):
    prototypes = begun(scale=7.5)
    prototypes.save(tmp_path / "prototypes.safetensors")
    again = Prototypes.load(tmp_path / "prototypes.safetensors")
    assert torch.equal(again.P, prototypes.P) and (again.classes, again.scale) == ("a digest", 7.5)
    told = json.loads(files.read_metadata(tmp_path / "prototypes.safetensors")["prototypes"])
    assert told == {"classes": "a digest", "scale": 7.5}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"Q": torch.zeros(2, 2)}, {"prototypes": '{"classes": "x", "scale": 1.0}'}),
        ({"P": torch.zeros(2)}, {"prototypes": '{"classes": "x", "scale": 1.0}'}),
        ({"P": torch.zeros(2, 2)}, {"prototypes": '{"classes": "x"}'}),
        ({"P": torch.zeros(2, 2)}, {}),
    ],
    ids=["no tensor", "no matrix", "no scale", "no facts"],
)
def test_a_file_of_something_else_is_named(tensors, metadata, tmp_path):
    files.write_tensors(tmp_path / "prototypes.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"prototypes\.safetensors"):
        Prototypes.load(tmp_path / "prototypes.safetensors")
