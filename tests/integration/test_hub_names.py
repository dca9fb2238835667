"""Exported weights bear the names of their family's hub checkpoints, which serving engines and older versions read."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from mllm_keeplora.exports.checkpoint import _name_as_on_the_hub
from mllm_keeplora.models.shipped import hub_id
from tests.support.families import FAMILIES, build_family

CLIP = "vision_tower.vision_model.embeddings.patch_embedding.weight"
LLAMA = "language_model.model.layers.0.self_attn.q_proj.weight"
LLAVA = (CLIP, LLAMA, "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight")
QWEN = ("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight")
QWEN3 = ("model.language_model.layers.0.self_attn.q_proj.weight", "model.visual.blocks.0.attn.qkv.weight")
IDEFICS = (
    "model.text_model.layers.0.self_attn.q_proj.weight",
    "model.vision_model.embeddings.patch_embedding.weight",
    "model.connector.modality_projection.proj.weight",
)
# As the families' checkpoints on the hub have them, e.g. llava-hf/llava-1.5-7b-hf, google/gemma-3-4b-it.
NAMES = {
    "llava": LLAVA,
    "llava-phi3": (CLIP, "language_model.model.layers.0.self_attn.qkv_proj.weight"),
    "llava-next": (*LLAVA, "image_newline"),
    "vipllava": LLAVA,
    "llava-onevision": (*LLAVA, "image_newline"),
    "qwen2-vl": QWEN,
    "qwen2.5-vl": QWEN,
    "qwen3-vl": QWEN3,
    "qwen3-vl-moe": (*QWEN3, "model.language_model.layers.0.mlp.experts.gate_up_proj"),
    "internvl": (LLAMA, "vision_tower.embeddings.cls_token", "multi_modal_projector.linear_1.weight"),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "paligemma": (CLIP, LLAMA, "multi_modal_projector.linear.weight"),
    "paligemma2": (CLIP, LLAMA, "multi_modal_projector.linear.weight"),
    "gemma3": (CLIP, LLAMA, "multi_modal_projector.mm_input_projection_weight"),
    "mllama": (LLAMA, "vision_model.patch_embedding.weight", "multi_modal_projector.weight"),
    "mistral3": (LLAMA, "vision_tower.transformer.layers.0.attention.q_proj.weight"),
    "aya-vision": (CLIP, LLAMA, "multi_modal_projector.linear_1.weight"),
}


def test_every_family_is_here():
    assert NAMES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", NAMES)
def test_saved_weights_bear_the_names_of_the_hub_and_load_again(family, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(build_family(family, tmp_path / "base"))
    _name_as_on_the_hub(model)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert set(NAMES[family]) <= names
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_base_is_known_by_its_hub_id_wherever_it_lies(tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert hub_id(str(snapshot)) == "org/tiny" and hub_id("llava-1.5-7b") == "llava-hf/llava-1.5-7b-hf"
    tuned = snapshot.parent.parent / "finetuned"
    tuned.mkdir()
    assert hub_id("tiny-llava") is None and hub_id(str(tmp_path)) is None and hub_id(str(tuned)) is None
