"""HiDe: which blocks are weighed, and that the others have every branch in full."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.mixture.hide import HiDe, HiDeOptions
from tests.support.strategies import context_of, learn
from tests.unit.adapters.conftest import random_factors
from tests.unit.conftest import encode, logits_of


def weighed(base, tiny_records, folder, **options):
    """The mixer after one domain."""
    context = context_of(base, Adapters(base, "merged", 0.0), tiny_records, 0)
    learn(HiDe(HiDeOptions(rank=3, **options)), context, folder, epochs=0.4)
    return context.answering


@pytest.mark.parametrize(("blocks", "depths"), [(1, {1}), (2, {0, 1}), (9, {0, 1})])
def test_the_last_blocks_of_the_language_model_are_weighed(base, tiny_records, tmp_path, blocks, depths):
    """All target layers in them, and no layer of the projector."""
    found = weighed(base, tiny_records, tmp_path, specific_blocks=blocks)
    wanted = {layer for layer in base.parts.target_layers if base.parts.depth(layer) in depths}
    assert set(found.layers) == wanted and 0 < len(wanted) < len(base.parts.target_layers)
    assert (found.temperature, found.modality, found.top1) == (0.1, "both", False)


def test_the_most_alike_domain_alone_answers_in_the_last_block_if_asked(base, tiny_records, tmp_path):
    assert weighed(base, tiny_records, tmp_path, last="top1").top1


def test_products_are_what_merging_gives_where_means_are_equal(base, new_base, tiny_records, tmp_path):
    """Equal means: every branch counts a half in the last block, and in full elsewhere."""
    mixer, batch = weighed(base, tiny_records, tmp_path), encode(base, tiny_records["Alpha"][:4])
    layers = mixer.layers
    mixer = type(mixer)(**{**mixer.settings(), "domains": 2})
    mixer.means.copy_(base.family.question_features(base.model, batch)[:1].expand(2, -1))
    branches, adapters = [random_factors(base, seed) for seed in (1, 2)], Adapters(new_base(), "merged", 0.0)
    halves = [replace(each, weight=dict.fromkeys(layers, 0.5)) for each in branches]
    adapters.restore(halves, [])
    merged = logits_of(adapters.model, batch)
    adapters.restore(branches, [], mixer)
    adapters.look_at(batch)
    assert torch.allclose(logits_of(adapters.model, batch), merged, atol=1e-4)
    assert torch.allclose(mixer.weights, torch.full((4, 2), 0.5), atol=1e-3)


def test_the_released_fusion_is_refused_in_a_sentence():
    with pytest.raises(ValidationError):
        HiDeOptions(fusion="sums")
    with pytest.raises(UserError, match=r"strategy.fusion: input should be 'products', got 'sums'"):
        build_strategy(StrategyConfig(name="hide", fusion="sums"))
