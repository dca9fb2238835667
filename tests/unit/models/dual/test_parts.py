"""Parts of a dual encoder by name: what is adapted, how deep it lies, what never is."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import load_base
from mllm_keeplora.models.dual.parts import name_parts


def test_attention_of_both_towers_is_adapted(base):
    kinds = {name.rsplit(".", 1)[-1] for name in base.parts.target_layers}
    assert kinds == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert len(base.parts.target_layers) == 4 * (3 + 2)
    assert {base.parts.tower(name): base.parts.depth(name) for name in base.parts.target_layers} == {
        "vision": 2,
        "text": 1,
    }


def test_projectors_are_adapted_where_asked_and_what_is_never_called_is_not(dual_folder):
    base = load_base(BaseConfig(model=str(dual_folder)), "keeplora")
    layers = set(base.parts.projector_layers)
    if "siglip" in str(dual_folder):
        assert layers == {"vision_model.head.mlp.fc1", "vision_model.head.mlp.fc2", "text_model.head"}
    else:
        assert layers == {"visual_projection", "text_projection"}
    assert all(base.parts.depth(name) is None and base.parts.tower(name) is None for name in layers)


def test_temperature_is_in_no_projector(base):
    assert not any(
        "logit" in name
        for each in base.parts.projectors
        for name, _ in base.model.get_submodule(each).named_parameters(each)
    )


def test_layers_are_named_by_their_ends_or_by_patterns(base):
    assert len(name_parts(base.model, "frozen", ["fc1"]).target_layers) == 5
    only = name_parts(base.model, "frozen", ["vision_model.encoder.layers.1.*"])
    assert only.tower_layers["text"] == () and {only.depth(name) for name in only.target_layers} == {1}
    with pytest.raises(UserError, match=r"adapters.target 'q_prj' is no linear layer of both towers; near: .*q_proj"):
        name_parts(base.model, "frozen", ["q_prj"])


def test_a_model_without_towers_is_refused():
    with pytest.raises(UserError, match="Linear has no vision tower called vision_model"):
        name_parts(torch.nn.Linear(2, 2), "frozen")
