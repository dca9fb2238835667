"""Bases, tokenizers and processors that bring code of their own, which leaves a mark if it is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "code_was_run"
CODE = """
from pathlib import Path

Path({mark!r}).touch()
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, CLIPImageProcessor
from transformers import PreTrainedTokenizerFast


class Config(LlavaConfig):
    model_type = "hostile"


class Model(LlavaForConditionalGeneration):
    config_class = Config


class Processor(LlavaProcessor):
    pass


class Tokenizer(PreTrainedTokenizerFast):
    pass


class Pictures(CLIPImageProcessor):
    pass
"""

Edit = Callable[[dict[str, Any]], None]


def edited(source: Path, folder: Path, name: str, edit: Edit) -> Path:
    """Copy a base's folder and change one of its JSON files."""
    if not folder.exists():
        shutil.copytree(source, folder)
    path = folder / name
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    return folder


def _model(values: dict[str, Any]) -> None:
    values |= {"model_type": "hostile", "architectures": ["Model"]}
    values["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}


def _tokenizer(values: dict[str, Any]) -> None:
    values |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}


def _processor(values: dict[str, Any]) -> None:
    values |= {"processor_class": "Processor", "auto_map": {"AutoProcessor": "own.Processor"}}


def _pictures(values: dict[str, Any]) -> None:
    own = {"image_processor_type": "Pictures", "auto_map": {"AutoImageProcessor": "own.Pictures"}}
    values["image_processor"] |= own


HOSTILE: dict[str, tuple[str, Edit]] = {
    "model": ("config.json", _model),
    "tokenizer": ("tokenizer_config.json", _tokenizer),
    "processor": ("processor_config.json", _processor),
    "image processor": ("processor_config.json", _pictures),
}


def write_hostile(source: Path, folder: Path, kind: str) -> Path:
    """Copy a base whose `kind` (a key of HOSTILE) is custom code, which writes MARK beside the folder if it is run."""
    edited(source, folder, *HOSTILE[kind])
    (folder / "own.py").write_text(CODE.format(mark=str(folder.parent / MARK)))
    return folder
