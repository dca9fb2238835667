"""The parts of a model by exact name, and what loading promises."""

import copy

import pytest
import torch

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import load_base, shipped
from mllm_keeplora.models.causal.parts import name_parts, summary_of
from mllm_keeplora.models.fingerprint import fingerprint

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def test_parts_of_the_tiny_model_have_exactly_these_names(base):
    assert base.parts.language_model == "model.language_model"
    assert base.parts.vision_tower == "model.vision_tower"
    assert base.parts.projectors[0] == "model.multi_modal_projector"
    expected = {f"model.language_model.layers.{number}.{kind}" for number in (0, 1) for kind in KINDS}
    assert set(base.parts.language_layers) == expected and len(base.parts.language_layers) == 14
    assert "lm_head" not in base.parts.target_layers


@pytest.mark.parametrize("projector", ["keeplora", "full", "frozen"])
def test_projector_layers_are_targets_only_where_keeplora_adapts_them(new_base, projector):
    parts = new_base(projector).parts
    names = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    assert parts.projector_layers == (names if projector == "keeplora" else ())
    assert len(parts.target_layers) == (16 if projector == "keeplora" else 14)
    assert parts.target_layers == parts.language_layers + parts.projector_layers


def test_depth_is_the_number_of_the_transformer_layer_and_none_for_the_projector(base):
    depths = [base.parts.depth(layer) for layer in base.parts.target_layers]
    assert depths == [0] * 7 + [1] * 7 + [None, None]
    assert base.parts.depth("model.vision_tower.encoder.layers.1.mlp.fc1") is None


def test_the_tower_is_the_language_model_and_none_for_the_projector(base):
    towers = [base.parts.tower(layer) for layer in base.parts.target_layers]
    assert towers == ["language"] * 14 + [None, None]


def test_every_target_layer_is_a_linear_layer_of_the_model(base):
    for layer in base.parts.target_layers:
        assert type(base.model.get_submodule(layer)) is torch.nn.Linear


def test_a_model_without_a_projector_is_refused_by_a_sentence(new_base):
    model = new_base().model
    model.model.adapter_between = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    with pytest.raises(UserError, match="LlavaForConditionalGeneration has no projector"):
        name_parts(model, "keeplora")


def names_of(base, target):
    return {
        name.removeprefix("model.language_model.layers.")
        for name in name_parts(base.model, "frozen", target).target_layers
    }


def test_layers_may_be_chosen_by_name_or_pattern(base):
    assert names_of(base, ["q_proj", "mlp.up_proj"]) == {f"{n}.{kind}" for n in (0, 1) for kind in (KINDS[0], KINDS[5])}
    assert names_of(base, ["*.layers.1.self_attn.*"]) == {f"1.{kind}" for kind in KINDS[:4]}
    assert names_of(base, ["model.language_model.layers.0.mlp.down_proj"]) == {"0.mlp.down_proj"}


def test_a_name_that_finds_nothing_or_only_a_part_is_refused_with_what_is_near(base):
    with pytest.raises(UserError, match=r"'q_prj' is no linear layer of model.language_model; near: .*q_proj"):
        names_of(base, ["v_proj", "q_prj"])
    with pytest.raises(UserError, match="no linear layer of"):
        names_of(base, ["*.layers.7.*"])
    holed = copy.deepcopy(base.model)
    holed.model.language_model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(UserError, match=r"'up_proj' is in 1 of 2 blocks of model.language_model \(not in 1\)"):
        name_parts(holed, "frozen", ["up_proj"])
    assert len(name_parts(holed, "frozen", ["*.up_proj"]).target_layers) == 1


def test_experts_in_one_tensor_are_refused_unless_other_layers_are_named(base):
    model = copy.deepcopy(base.model)
    model.model.language_model.layers[0].mlp.experts = torch.nn.ParameterList([torch.zeros(4, 8, 8)])
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.0 .* name the layers to adapt"):
        name_parts(model, "frozen")
    assert len(name_parts(model, "frozen", ["q_proj"]).target_layers) == 2


def test_the_summary_tells_kinds_counts_and_shapes(base):
    language, projector, tower = summary_of(base.model, base.parts)
    assert "2 q_proj 32 x 32" in language and "2 down_proj 32 x 48" in language
    assert "1 linear_1 32 x 32" in projector and "frozen" in tower


def test_a_loaded_base_is_frozen_and_in_evaluation_mode(tiny_folder):
    base = load_base(BaseConfig(model=str(tiny_folder)), "keeplora")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}


def test_loading_twice_gives_the_same_weights_and_fingerprint(new_base, tiny_folder):
    one, two = new_base(), load_base(BaseConfig(model=str(tiny_folder)), "frozen")
    assert one.fingerprint == two.fingerprint == fingerprint(tiny_folder)
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name


def test_fingerprint_changes_with_a_weight(tiny_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copied = tmp_path / "copy"
    shutil.copytree(tiny_folder, copied)
    assert fingerprint(copied) == fingerprint(tiny_folder)
    weights = load_file(copied / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert fingerprint(copied) != fingerprint(tiny_folder)


@pytest.mark.parametrize("model", ["no_such_base", "./no_such_folder", "a/b/c"])
def test_an_unknown_base_is_refused_by_its_name(model):
    with pytest.raises(UserError, match=f"base.model '{model}' is neither a shipped base"):
        load_base(BaseConfig(model=model), "keeplora")


@pytest.mark.parametrize("told", [{"family": "causal"}, {}, {"family": "video"}])
def test_the_yaml_of_a_base_may_name_its_family(told, tiny_folder, monkeypatch):
    monkeypatch.setattr(shipped, "_shipped", lambda: {"mine": {"path": str(tiny_folder), **told}})
    if told.get("family") != "video":
        assert type(load_base(BaseConfig(model="mine"), "frozen").family).__name__ == "CausalFamily"
        return
    with pytest.raises(
        UserError, match=r"^family 'video' is not known; known: causal, dual \(YAML of base.model 'mine'\)$"
    ):
        load_base(BaseConfig(model="mine"), "frozen")
