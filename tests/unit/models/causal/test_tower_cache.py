"""The vision tower is run once per picture, and nobody can tell."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.models import TowerCache, cache_tower, load_base
from tests.support.tiny import SIDE, write_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def base(folder):
    return load_base(BaseConfig(model=str(folder), dtype="float32"), "keeplora")


@pytest.fixture
def pictures():
    return torch.randn(11, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def features(base, pictures):
    with torch.no_grad():
        return torch.stack(list(base.model.model.get_image_features(pictures).pooler_output))


def test_features_are_those_without_a_cache_whatever_was_seen_before(base, pictures):
    plain = features(base, pictures)
    cache = cache_tower(base, 64)
    torch.testing.assert_close(features(base, pictures[3:9]), plain[3:9])
    torch.testing.assert_close(features(base, pictures.flip(0)), plain.flip(0))
    torch.testing.assert_close(features(base, pictures[[2, 2, 5]]), plain[[2, 2, 5]])
    cache.remove()
    torch.testing.assert_close(features(base, pictures), plain)


def test_what_a_picture_gives_does_not_depend_on_its_company_to_the_bit(base, pictures):
    cache = cache_tower(base, 64)
    together = features(base, pictures)
    cache.remove()
    cache = cache_tower(base, 64)
    alone = torch.cat([features(base, pictures[i : i + 1]) for i in range(len(pictures))])
    cache.remove()
    cached = features(base, pictures)
    assert together.shape == cached.shape
    assert torch.equal(together, alone)


def test_the_tower_sees_each_picture_once(base, pictures):
    cache = cache_tower(base, 64)
    for part in (pictures[:4], pictures[2:], pictures):
        features(base, part)
    assert cache.computed == len(pictures)


def test_the_oldest_pictures_leave_when_the_room_is_full(base, pictures):
    cache = cache_tower(base, 64)
    features(base, pictures[:1])
    cache.capacity = 3 * cache.bytes
    features(base, pictures[1:5])
    assert 0 < cache.bytes <= cache.capacity
    before = cache.computed
    features(base, pictures[4:5])
    assert cache.computed == before
    features(base, pictures[:1])
    assert cache.computed == before + 1


def test_outputs_made_while_answering_can_be_trained_through(base, pictures):
    cache_tower(base, 64)
    with torch.inference_mode():
        base.model.model.get_image_features(pictures)
    projector = base.model.model.multi_modal_projector.requires_grad_(True)
    torch.stack(list(base.model.model.get_image_features(pictures).pooler_output)).sum().backward()
    assert projector.linear_1.weight.grad.abs().sum() > 0


def test_what_was_given_in_another_precision_is_not_taken(base, pictures):
    cache = cache_tower(base, 64)
    exact = features(base, pictures[:2])
    with torch.autocast("cpu", torch.bfloat16):
        features(base, pictures[:2])
    assert cache.computed == 4
    assert torch.equal(features(base, pictures[:2]), exact) and cache.computed == 4


def test_a_tower_that_trains_is_left_alone(base, pictures):
    cache = cache_tower(base, 64)
    base.model.model.vision_tower.requires_grad_(True)
    features(base, pictures)
    assert cache.computed == 0


def test_zero_keeps_nothing_and_dropout_forbids_it(base):
    assert cache_tower(base, 0) is None
    base.model.model.vision_tower.config.attention_dropout = 0.1
    assert cache_tower(base, 64) is None


def test_a_tower_with_inputs_beside_the_pixels_is_left_alone():
    class Tower(torch.nn.Module):
        calls = 0

        def forward(self, pixel_values, grid=None):
            self.calls += 1
            return {"last_hidden_state": pixel_values.flatten(1)}

    tower = Tower()
    cache = TowerCache(tower, 1 << 20)
    for _ in range(2):
        tower(torch.ones(2, 3, 4, 4), grid=torch.ones(2, 3))
        tower(torch.ones(8, 12))
    assert tower.calls == 4 and cache.computed == 0
