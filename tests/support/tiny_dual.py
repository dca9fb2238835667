"""A tiny CLIP and a tiny SigLIP with random weights, and class records of coloured squares."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tests.support.tiny import COLOURS, DOMAINS, PLACES, SIDE, write_tiny_data

WORDS = ["a", "photo", "of", "the", "square", ".", ","]
PLACES_TEXT = 16  # positions of the text tower
LETTERS, LETTERS_TEXT = "abcdefghijklmnopqrstuvwxyz.,▁", 48
CLASSES = {"colour": list(COLOURS), "place": list(PLACES)}


def write_tiny_clip(folder: Path, seed: int = 0, positions: int = PLACES_TEXT) -> Path:
    """A real CLIPModel: 3 image blocks of width 32, 2 text blocks of width 24, with its processor."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    tokenizer = _tokenizer(mask=True, positions=positions)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    text |= {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_vision(32), projection_dim=16))
    return _saved(model, tokenizer, folder)


def write_tiny_siglip(folder: Path, seed: int = 0) -> Path:
    """A real SiglipModel: 3 image blocks and 2 text blocks of width 24, with its processor."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    tokenizer = _tokenizer(mask=False)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": PLACES_TEXT}
    text |= {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_vision(24)))
    with torch.no_grad():  # as transformers makes them: towers of random weights see next to nothing
        model.logit_scale.fill_(3.0)
    return _saved(model, tokenizer, folder)


def write_tiny_relative(kind: str, folder: Path, seed: int = 0) -> Path:
    """A model of a relative's own class: an image tower of its kind, and a text tower of two blocks of width 24."""
    import torch
    import transformers

    by_letters = kind == "Siglip2"  # whose own tokenizer knows no words without merges
    positions = LETTERS_TEXT if by_letters else PLACES_TEXT
    tokenizer = _tokenizer(not by_letters, positions, list(LETTERS) if by_letters else None)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer) + by_letters}
    text |= {"max_position_embeddings": positions + (kind == "AltCLIP")}
    text |= {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    vision, own = _vision(32), {"projection_dim": 16}
    if kind == "AltCLIP":
        text["project_dim"] = 20
    if kind == "Align":
        vision, own = _CONVOLUTIONS, {"projection_dim": 24}
    if kind == "Siglip2":
        vision, own = {**_vision(24), "num_patches": (SIDE // 8) ** 2}, {}
        del vision["image_size"]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **own)
    model = getattr(transformers, f"{kind}Model")(config)
    if kind == "Siglip2":
        with torch.no_grad():
            model.logit_scale.fill_(3.0)
    return _saved(model, tokenizer, folder, kind)


RELATIVES = {
    kind.lower(): partial(write_tiny_relative, kind)
    for kind in ("MetaClip2", "AltCLIP", "ChineseCLIP", "Siglip2", "Align")
}
DUAL_BASES = {"clip": write_tiny_clip, "siglip": write_tiny_siglip}


def write_class_data(root: Path, train: int = 24, test: int = 12, domains: tuple[str, ...] = tuple(DOMAINS)) -> Path:
    """The squares of `write_tiny_data` as class records: even domains ask for the colour, odd ones for the place."""
    write_tiny_data(root, train, test, domains)
    for number, name in enumerate(domains):
        for part in ("train", "test"):
            rows = json.loads((root / name / f"{part}.json").read_text())
            own = [_class_row(row, part, list(CLASSES.values())[number % 2]) for row in rows]
            (root / name / f"{part}.json").write_text(json.dumps([row for row in own if row]))
        names = list(CLASSES.values())[number % 2]
        listed = {"names": names, "prompts": ["a photo of a {} square .", "the {} square"]}
        (root / name / "classes.json").write_text(json.dumps(listed))
    return root


def class_benchmark(root: Path, domains: tuple[str, ...] = tuple(DOMAINS)) -> dict:
    parts = {
        name: {"train": f"{root}/{name}/train.json", "test": f"{root}/{name}/test.json"}
        | {"classes": f"{root}/{name}/classes.json"}
        for name in domains
    }
    return {"name": "tiny_classes", "domains": parts}


def _class_row(row: dict, part: str, names: list[str]) -> dict | None:
    told = [turn["value"] for turn in row.get("conversations", []) if turn["from"] == "gpt"] or [row.get("answer")]
    label = next((each for each in told if each in names), None)
    return label and {"id": row.get("id", row.get("question_id")), "image": row["image"], "label": label}


def _vision(width: int) -> dict:
    return {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": SIDE, "patch_size": 8}  # fmt: skip


# ALIGN's image tower, an EfficientNet of two stages
_CONVOLUTIONS = {
    "image_size": SIDE, "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 8, "hidden_dim": 24,
    "kernel_sizes": [3, 3], "in_channels": [32, 8], "out_channels": [8, 24], "strides": [1, 2],
    "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [],
}  # fmt: skip


def _saved(model, tokenizer, folder: Path, kind: str = "") -> Path:
    import transformers
    from transformers import CLIPImageProcessor, CLIPProcessor, SiglipImageProcessor, SiglipProcessor

    side = {"height": SIDE, "width": SIDE}
    if kind == "Siglip2":
        images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=(SIDE // 8) ** 2)
        processor = transformers.Siglip2Processor(images, tokenizer)
    elif kind == "Align":
        processor = transformers.AlignProcessor(transformers.EfficientNetImageProcessor(size=side), tokenizer)
    elif tokenizer.model_input_names == ["input_ids"]:
        processor = SiglipProcessor(SiglipImageProcessor(size=side), tokenizer)
    else:
        processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(mask: bool, positions: int = PLACES_TEXT, known: list[str] | None = None):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "<unk>", *dict.fromkeys(known or [*WORDS, *COLOURS, *PLACES]), "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<s>", 1), ("</s>", len(words) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"] if mask else ["input_ids"],
    )
