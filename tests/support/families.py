"""Tiny checkpoints of the real classes of each family of image-text-to-text models, with their real processors.

Weights are random, widths are tens, pictures become few tokens. Nothing is read but what transformers brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.family_templates import TEMPLATES

WIDTH, SIDE, PATCH, RANGE = 32, 32, 8, 0.1
SQUARE = {"height": SIDE, "width": SIDE}
GRIDS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
WORDS = "what colour is the square? it is red green blue white on the left or right. yes no a man in the picture " * 3
LLAMA = {"marks": "<unk> <s> </s> <pad> <image>", "bos": "<s>", "eos": "</s>", "pad": "<pad>", "add_bos": True}
CHATML = "<|endoftext|> <|im_start|> <|im_end|> "
QWEN = {"bos": None, "eos": "<|im_end|>", "pad": "<|endoftext|>", "ends": ("<|endoftext|>",)}
VISION_MARKS = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
GRID_MARKS = "<fake_token_around_image> <global-img> <end_of_utterance> <image> " + " ".join(
    f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)
)
GEMMA = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@cache
def _byte_pairs() -> str:
    """A byte-level tokenizer without special tokens, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    return tokenizer.to_str()


def _tokenizer(
    marks: str,
    bos: str | None,
    eos: str,
    pad: str,
    add_bos: bool = False,
    ends: tuple[str, ...] = (),
    names: dict[str, str] | None = None,
    rstrip: tuple[str, ...] = (),
) -> hf.PreTrainedTokenizerFast:
    """The shared tokenizer with a family's special tokens.

    Args:
        marks: special tokens in the order of their ids, after all others.
        add_bos: the tokenizer itself puts `bos` before a text.
        ends: tokens that end an answer besides `eos`; kept for the generation config.
        names: attributes of the tokenizer that give special tokens.
        rstrip: special tokens that swallow white space behind them.
    """
    tokenizer = Tokenizer.from_str(_byte_pairs())
    tokenizer.add_special_tokens([AddedToken(m, normalized=False, rstrip=m in rstrip) for m in marks.split()])
    wrapped = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        add_bos_token=add_bos,
        extra_special_tokens=names or {},
    )
    wrapped.ends = [eos, *ends]
    return wrapped


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Settings that text models have in common."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": RANGE,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**settings, **changes}


def _tower(**changes: Any) -> dict[str, Any]:
    """Settings that vision towers have in common."""
    settings = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**settings, "image_size": SIDE, "patch_size": PATCH, **changes}


def _siglip(**changes: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**_tower(vision_use_head=False, **changes))


def _write(folder: Path, kind: type, config: Any, processor: Any) -> None:
    tokenizer = processor.tokenizer
    ends = tokenizer.__dict__.pop("ends")
    model = kind(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # gates and projections that start at zero hide the picture
            if name.endswith(("gate", "mm_input_projection_weight", "image_newline")):
                weight.normal_(0.5 if name.endswith("gate") else 0.0, RANGE)
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _llava(folder: Path, family: str, kind: type, config: type, text: type, marks: dict, **changes: Any) -> None:
    """LLaVA and its like: a CLIP tower without its class token."""
    tokenizer = _tokenizer(**marks)
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        tokenizer,
        patch_size=2 * PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[family],
    )
    settings = config(
        vision_config=hf.CLIPVisionConfig(**_tower(patch_size=2 * PATCH)),
        text_config=text(**_text(tokenizer)),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        **changes,
    )
    _write(folder, kind, settings, processor)


def _llava_next(folder: Path) -> None:
    tokenizer = _tokenizer(**LLAMA)
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRIDS[1:]),
        tokenizer,
        patch_size=2 * PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["llava-next"],
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_tower(patch_size=2 * PATCH)),
        text_config=hf.MistralConfig(**_text(tokenizer)),
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=GRIDS[1:],
        image_seq_length=4,
    )
    _write(folder, hf.LlavaNextForConditionalGeneration, config, processor)


def _llava_onevision(folder: Path) -> None:
    tokenizer = _tokenizer(CHATML + "<image> <video>", **QWEN)
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=GRIDS),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATES["llava-onevision"],
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=_siglip(patch_size=2 * PATCH),
        text_config=hf.Qwen2Config(**_text(tokenizer)),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_grid_pinpoints=GRIDS,
    )
    _write(folder, hf.LlavaOnevisionForConditionalGeneration, config, processor)


def _qwen(folder: Path, family: str, name: str, processor: type, tower: dict, text: dict) -> None:
    """The Qwen-VL models: pictures keep their shape, positions have three axes."""
    tokenizer = _tokenizer(CHATML + VISION_MARKS, **QWEN)
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 2304}}
    videos = hf.Qwen3VLVideoProcessor if name.startswith("Qwen3") else hf.Qwen2VLVideoProcessor
    whole = processor(
        hf.Qwen2VLImageProcessor(**sizes), tokenizer, videos(**sizes), chat_template=TEMPLATES[family.split("-moe")[0]]
    )
    ids = tokenizer.convert_tokens_to_ids(VISION_MARKS.split())
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = getattr(hf, f"{name}Config")(
        vision_config={"depth": 2, "num_heads": 2, "patch_size": PATCH, "initializer_range": RANGE, **tower},
        text_config=_text(tokenizer, rope_parameters=ROPE, **text),
        **dict(zip(keys, ids, strict=True)),
    )
    _write(folder, getattr(hf, f"{name}ForConditionalGeneration"), config, whole)


def _internvl(folder: Path) -> None:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(
        CHATML + "<img> </img> <IMG_CONTEXT> <video>", **QWEN, names={**names, "video_token": "<video>"}
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=2),
        tokenizer,
        hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=TEMPLATES["internvl"],
    )
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_tower()),
        text_config=hf.Qwen2Config(**_text(tokenizer, tie_word_embeddings=True)),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    _write(folder, hf.InternVLForConditionalGeneration, config, processor)


def _idefics(folder: Path, family: str, name: str, marks: dict, **more: Any) -> None:
    tokenizer = _tokenizer(**marks)
    images = getattr(hf, f"{name}ImageProcessor")(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = getattr(hf, f"{name}Processor")(
        images, tokenizer, image_seq_len=4, chat_template=TEMPLATES[family], **more
    )
    config = getattr(hf, f"{name}Config")(
        vision_config=_tower(initializer_range=RANGE),
        text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    _write(folder, getattr(hf, f"{name}ForConditionalGeneration"), config, processor)
