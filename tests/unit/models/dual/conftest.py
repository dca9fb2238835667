"""A loaded tiny CLIP and a tiny SigLIP, and records of two class lists."""

from __future__ import annotations

import json

import pytest

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.models import load_base
from tests.support.tiny import COLOURS, PLACES
from tests.support.tiny_dual import DUAL_BASES, write_class_data

LISTS = {
    "Alpha": ClassList.of(list(COLOURS), ["a photo of a {} square .", "the {} square"]),
    "Beta": ClassList.of(list(PLACES), ["the square , {}"]),
}


@pytest.fixture(scope="session", params=DUAL_BASES)
def dual_folder(request, tmp_path_factory):
    return DUAL_BASES[request.param](tmp_path_factory.mktemp("dual") / request.param)


@pytest.fixture
def base(dual_folder):
    return load_base(BaseConfig(model=str(dual_folder)), "frozen")


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Training records by domain; those of Alpha name colours, those of Beta places."""
    root = write_class_data(tmp_path_factory.mktemp("class_data"), domains=("Alpha", "Beta"))
    found = {}
    for name, classes in LISTS.items():
        rows = json.loads((root / name / "train.json").read_text())
        media = [Media("image", root / name / row["image"]) for row in rows]
        turns = [(Turn("user", "?"), Turn("assistant", row["label"])) for row in rows]
        found[name] = [
            Record(row["id"], (picture,), said, origin=row["id"], classes=classes)
            for row, picture, said in zip(rows, media, turns, strict=True)
        ]
    return found
