"""Tiny checkpoints of the real classes of each family of image-text-to-text models, with their real processors.

Weights are random, widths are tens, pictures become few tokens. Nothing is read but what transformers brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.support.family_templates import TEMPLATES, TOKENIZERS, VISION_MARKS, tokenizer_of

WIDTH, TOWER, SIDE, PATCH, RANGE = 64, 32, 32, 8, 0.1  # widths of text and tower; pictures; spread of weights
SQUARE = {"height": SIDE, "width": SIDE}
GRIDS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}


def build_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a family's checkpoint as its hub folder looks; the same seed gives the same weights.

    Raises:
        KeyError: the family is not known or cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        {**FAMILIES, **OF_CLIPS}[name](folder)
    return folder


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Settings that text models have in common."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": RANGE,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**settings, **changes}


def _tower(**changes: Any) -> dict[str, Any]:
    """Settings that vision towers have in common."""
    settings = {"hidden_size": TOWER, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**settings, "image_size": SIDE, "patch_size": PATCH, **changes}


def _siglip(**changes: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**_tower(vision_use_head=False, **changes))


def _write(
    folder: Path, family: str, name: str, processor: Any, vision: Any, text: Any, ends: str = "", **config: Any
) -> None:
    """Random weights and all files.

    Args:
        family: key of the chat template.
        name: what the family's classes are called, without `ForConditionalGeneration`.
        vision, text: configs of the parts.
        ends: tokens that end an answer besides the tokenizer's own.
        config: settings of the whole.
    """
    tokenizer = processor.tokenizer
    config = {"image_token_id": processor.image_token_id, **config}
    whole = getattr(hf, f"{name}Config")(vision_config=vision, text_config=text, **config)
    model = getattr(hf, f"{name}ForConditionalGeneration")(whole)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():  # what starts at zero would hide the picture
            if parameter.endswith("gate"):
                weight.fill_(0.5)
            elif parameter.endswith("mm_input_projection_weight"):
                weight.normal_(0.0, RANGE)
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends.split())}),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.chat_template = TEMPLATES[family]
    processor.save_pretrained(folder)


def _llava(folder: Path, family: str, name: str, text: type, ends: str = "", **config: Any) -> None:
    """LLaVA and its like: a CLIP tower without its class token; LLaVA-NeXT cuts pictures into tiles."""
    tokenizer, grids = tokenizer_of(**TOKENIZERS[family]), name == "LlavaNext"
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
    if grids:
        config["image_grid_pinpoints"] = settings["image_grid_pinpoints"] = GRIDS[1:]
    processor = (hf.LlavaNextProcessor if grids else hf.LlavaProcessor)(
        (hf.LlavaNextImageProcessor if grids else hf.CLIPImageProcessor)(**settings),
        tokenizer,
        patch_size=2 * PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    tower = hf.CLIPVisionConfig(**_tower(patch_size=2 * PATCH))
    _write(folder, family, name, processor, tower, text(**_text(tokenizer)), ends, image_seq_length=4, **config)


def _llava_next_video(folder: Path) -> None:
    tokenizer = tokenizer_of(**TOKENIZERS["llava-next-video"])
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(**settings),
        hf.LlavaNextImageProcessor(**settings, image_grid_pinpoints=GRIDS[1:]),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    ids = {"video_token_id": processor.video_token_id, "image_grid_pinpoints": GRIDS[1:]}
    tower, text = hf.CLIPVisionConfig(**_tower()), hf.LlamaConfig(**_text(tokenizer))
    _write(folder, "llava-next-video", "LlavaNextVideo", processor, tower, text, **ids)


def _video_llava(folder: Path) -> None:
    """A tower for pictures and another one for clips."""
    tokenizer = tokenizer_of(**TOKENIZERS["video-llava"])
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
    processor = hf.VideoLlavaProcessor(
        hf.VideoLlavaImageProcessor(**settings),
        hf.VideoLlavaVideoProcessor(**settings),
        tokenizer,
        patch_size=2 * PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    tower, text = hf.CLIPVisionConfig(**_tower(patch_size=2 * PATCH)), hf.LlamaConfig(**_text(tokenizer))
    _write(folder, "video-llava", "VideoLlava", processor, tower, text, video_token_id=processor.video_token_id)


def _llava_onevision(folder: Path) -> None:
    tokenizer = tokenizer_of(**TOKENIZERS["llava-onevision"])
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=GRIDS),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    tower, text = _siglip(patch_size=2 * PATCH), hf.Qwen2Config(**_text(tokenizer))
    ids = {"video_token_id": processor.video_token_id, "image_grid_pinpoints": GRIDS}
    _write(folder, "llava-onevision", "LlavaOnevision", processor, tower, text, "<|endoftext|>", **ids)


def _qwen(folder: Path, name: str, family: str, tower: dict, **text: Any) -> None:
    """The Qwen-VL models: pictures keep their shape, positions have three axes."""
    tokenizer, base = tokenizer_of(**TOKENIZERS[family]), name.removesuffix("Moe")
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 2304}}
    videos = hf.Qwen3VLVideoProcessor if base == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    processor = getattr(hf, f"{base}Processor")(hf.Qwen2VLImageProcessor(**sizes), tokenizer, videos(**sizes))
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(keys, tokenizer.convert_tokens_to_ids(VISION_MARKS.split()), strict=True))
    tower = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "initializer_range": RANGE, **tower}
    text = _text(tokenizer, rope_parameters=dict(ROPE), **text)
    _write(folder, family, name, processor, tower, text, "<|endoftext|>", **ids)


def _internvl(folder: Path) -> None:
    tokenizer = tokenizer_of(**TOKENIZERS["internvl"])
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=2)
    processor = hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(size=SQUARE), image_seq_length=4)
    tower, text = hf.InternVLVisionConfig(**_tower()), hf.Qwen2Config(**_text(tokenizer, tie_word_embeddings=True))
    _write(folder, "internvl", "InternVL", processor, tower, text, "<|endoftext|>", image_seq_length=4)


def _idefics(folder: Path, family: str, name: str) -> None:
    """Idefics3 and SmolVLM: a picture becomes its tiles and itself made small."""
    tokenizer = tokenizer_of(**TOKENIZERS[family])
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    more = {"video_processor": hf.SmolVLMVideoProcessor(**sizes)} if name == "SmolVLM" else {}
    images = getattr(hf, f"{name}ImageProcessor")(**sizes)
    processor = getattr(hf, f"{name}Processor")(images, tokenizer, image_seq_len=4, **more)
    tower, text = _tower(initializer_range=RANGE), hf.LlamaConfig(**_text(tokenizer))
    pad = tokenizer.pad_token_id
    _write(folder, family, name, processor, tower, text, "<end_of_utterance>", pad_token_id=pad, scale_factor=2)


def _paligemma(folder: Path, text: type, **changes: Any) -> None:
    """Every record needs a picture; the processor gives labels of its own, and token types that are all 0."""
    tokenizer = tokenizer_of(**TOKENIZERS["paligemma"])
    processor = hf.PaliGemmaProcessor(hf.SiglipImageProcessor(size=SQUARE, image_seq_length=4), tokenizer)
    sizes = {"vocab_size": len(tokenizer), "projection_dim": WIDTH, "hidden_size": WIDTH}
    tower, text = _siglip(patch_size=2 * PATCH), text(**_text(tokenizer, head_dim=16, **changes))
    _write(folder, "paligemma", "PaliGemma", processor, tower, text, **sizes)


def _gemma3(folder: Path) -> None:
    """The projector is a parameter, not a linear layer."""
    tokenizer = tokenizer_of(**TOKENIZERS["gemma3"])
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    text = hf.Gemma3TextConfig(**_text(tokenizer, head_dim=16, query_pre_attn_scalar=16, **SLIDING))
    ids = {key: getattr(tokenizer, key) for key in ("boi_token_id", "eoi_token_id", "image_token_id")}
    _write(folder, "gemma3", "Gemma3", processor, _siglip(), text, "<end_of_turn>", mm_tokens_per_image=4, **ids)


def _mllama(folder: Path) -> None:
    """Pictures reach the text by cross-attention; the image token is the first id that the head does not know.

    Either every record of a batch has a picture or none has.
    """
    tokenizer = tokenizer_of(**TOKENIZERS["mllama"])
    processor = hf.MllamaProcessor(hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer)
    tower = {"num_global_layers": 1, "intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * TOWER}
    text = _text(tokenizer, vocab_size=len(tokenizer) - 1, cross_attention_layers=[1])
    parts = hf.MllamaVisionConfig(**_tower(**tower, initializer_range=RANGE)), hf.MllamaTextConfig(**text)
    _write(folder, "mllama", "Mllama", processor, *parts, "<|end_of_text|> <|eom_id|>")


def _mistral3(folder: Path) -> None:
    tokenizer = tokenizer_of(**TOKENIZERS["mistral3"])
    images = hf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size=PATCH)
    processor = hf.PixtralProcessor(images, tokenizer, patch_size=PATCH, spatial_merge_size=2)
    tower = hf.PixtralVisionConfig(**_tower(image_size=48, initializer_range=RANGE))
    text, more = hf.MistralConfig(**_text(tokenizer, head_dim=16)), {"tie_word_embeddings": False}
    _write(folder, "mistral3", "Mistral3", processor, tower, text, spatial_merge_size=2, **more)


def _aya_vision(folder: Path) -> None:
    tokenizer = tokenizer_of(**TOKENIZERS["aya-vision"])
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=2)
    sizes = {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2}
    processor = hf.AyaVisionProcessor(images, tokenizer, **sizes)
    text = hf.Cohere2Config(**_text(tokenizer, logit_scale=1.0, **SLIDING))
    _write(folder, "aya-vision", "AyaVision", processor, _siglip(), text, downsample_factor=2)


VISUAL = {"hidden_size": TOWER, "intermediate_size": 48, "out_hidden_size": WIDTH}
DEEP = {**VISUAL, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
UNBUILDABLE: dict[str, str] = {}
if find_spec("num2words") is None:
    UNBUILDABLE["smolvlm"] = "SmolVLMProcessor raises ImportError when it is made without the package num2words."
FAMILIES: dict[str, Callable[[Path], None]] = {
    "llava": partial(_llava, family="llava", name="Llava", text=hf.LlamaConfig),
    "llava-phi3": partial(_llava, family="llava-phi3", name="Llava", text=hf.Phi3Config, ends="<|end|>"),
    "llava-next": partial(_llava, family="llava-next", name="LlavaNext", text=hf.MistralConfig),
    "vipllava": partial(
        _llava, family="vipllava", name="VipLlava", text=hf.LlamaConfig, vision_feature_layer=[-2, -3, 2]
    ),
    "llava-onevision": _llava_onevision,
    "qwen2-vl": partial(
        _qwen, family="qwen2-vl", name="Qwen2VL", tower={"embed_dim": TOWER, "hidden_size": WIDTH, "mlp_ratio": 2}
    ),
    "qwen2.5-vl": partial(
        _qwen, family="qwen2.5-vl", name="Qwen2_5_VL", tower={**VISUAL, "window_size": 32, "fullatt_block_indexes": [1]}
    ),
    "qwen3-vl": partial(_qwen, family="qwen3-vl", name="Qwen3VL", tower=DEEP, head_dim=16),
    "qwen3-vl-moe": partial(_qwen, family="qwen3-vl", name="Qwen3VLMoe", tower=DEEP, head_dim=16, **EXPERTS),
    "internvl": _internvl,
    "idefics3": partial(_idefics, family="idefics3", name="Idefics3"),
    "smolvlm": partial(_idefics, family="smolvlm", name="SmolVLM"),
    # With narrow weights it repeats its last token.
    "paligemma": partial(_paligemma, text=hf.GemmaConfig, initializer_range=3 * RANGE),
    "paligemma2": partial(_paligemma, text=hf.Gemma2Config, query_pre_attn_scalar=16, **SLIDING),
    "gemma3": _gemma3,
    "mllama": _mllama,
    "mistral3": _mistral3,
    "aya-vision": _aya_vision,
}
FAMILIES = {name: build for name, build in FAMILIES.items() if name not in UNBUILDABLE}
# Families for clips, beside those of `FAMILIES` that take them, too.
OF_CLIPS: dict[str, Callable[[Path], None]] = {"llava-next-video": _llava_next_video, "video-llava": _video_llava}
