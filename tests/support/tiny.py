"""A tiny LLaVA with random weights and a tiny benchmark of coloured squares: seconds instead of minutes, same code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

SIDE = 32
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220), "white": (240, 240, 240)}
PLACES = {"left": 2, "right": 18}
DOMAINS = {"Alpha": (20, 20, 20), "Beta": (120, 120, 60), "Gamma": (70, 20, 90)}
WORDS = ["what", "colour", "is", "the", "square", "where", "?", "user", ":", "assistant", "yes", "no"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' ' + m['role'] + ' : ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant :' }}{% endif %}"
)


def write_tiny_llava(folder: Path, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """A real LlavaForConditionalGeneration with processor, random weights, saved as transformers saves it."""
    import torch
    from transformers import LlavaForConditionalGeneration

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [*special, *dict.fromkeys([*WORDS, *COLOURS, *PLACES])]
    processor = _processor(words)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(_llava_config(words, hidden, layers))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tiny_data(root: Path, train: int = 24, test: int = 12, domains: tuple[str, ...] = tuple(DOMAINS)) -> Path:
    """Domains in the MLLM-DCL folder layout: one coloured square left or right on the domain's own background."""
    for number, name in enumerate(domains):
        rng = np.random.default_rng(number)
        for part, count in (("train", train), ("test", test)):
            rows = [_record(root / name, part, i, rng, DOMAINS[name]) for i in range(count)]
            (root / name / f"{part}.json").write_text(json.dumps(rows))
    return root


def tiny_benchmark(root: Path, domains: tuple[str, ...] = tuple(DOMAINS), suite: bool = True) -> dict:
    """The benchmark of a run's YAML over `write_tiny_data`'s folder; the first domain's test is also a suite."""
    defaults = {"scorer": "exact", "max_new_tokens": 3}
    parts = {n: {"train": f"{root}/{n}/train.json", "test": f"{root}/{n}/test.json"} for n in domains}
    suites = {"general": {"test": f"{root}/{domains[0]}/test.json"}} if suite else {}
    return {"name": "tiny", "defaults": defaults, "domains": parts, "suites": suites}


def tiny_config(base: Path, data: Path, output: Path, **changes) -> dict:
    """A whole run that takes a few seconds."""
    values = {
        "name": "tiny",
        "base": {"model": str(base)},
        "benchmark": tiny_benchmark(data),
        "strategy": {"name": "keeplora", "rank": 4, "alpha": 8, "grad_samples": 8, "feature_samples": 8},
        "train": {"lr": 1e-2, "epochs": 1, "batch_size": 4, "checkpoint_steps": 2, "log_steps": 1},
        "eval": {"domains": "all", "batch_size": 8},
        "threads": 1,
        "output": str(output),
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return values


def _record(folder: Path, part: str, index: int, rng: np.random.Generator, background: tuple) -> dict:
    from PIL import Image

    colour, place = rng.choice(list(COLOURS)), rng.choice(list(PLACES))
    pixels = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:] = background
    left = PLACES[place]
    pixels[8:22, left : left + 12] = COLOURS[colour]
    pixels = np.clip(pixels + rng.integers(-8, 8, pixels.shape), 0, 255).astype(np.uint8)
    name = f"images/{part}_{index}.png"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    asked = [("what colour is the square ?", str(colour)), ("where is the square ?", str(place))]
    if part == "test":
        question, answer = asked[index % 2]
        return {"question_id": f"{part}{index}", "image": name, "text": question, "answer": answer}
    turns = []
    for number, (question, answer) in enumerate(asked[: 1 + index % 2]):
        mark = "<image>\n" if number == 0 else ""
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": f"{part}{index}", "image": name, "conversations": turns}


def _processor(words: list[str]) -> LlavaProcessor:
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=_tokenizer(words),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _llava_config(words: list[str], hidden: int, layers: int) -> LlavaConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=words.index("<image>"), vision_feature_layer=-1
    )
