"""A kind of input, and small valid ones: pictures, records, a benchmark, a run's config."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS = ("Lamps", "Cups")


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: of the reader, in the tally.
        kind: of its mutations.
        path: where the input lies.
        valid: what lies there before it is spoilt.
        read: reads it as the commands do.
    """

    name: str
    kind: str
    path: Path
    valid: bytes
    read: Callable[[Path], Any]


def encoded(size: tuple[int, int] = (12, 8), form: str = "PNG", **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, form, **options)
    return buffer.getvalue()


def written_data(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (folder / "images" / f"{name}.png").write_bytes(encoded())
    train, test = llava_rows(), test_rows()
    for name in DOMAINS:
        (folder / f"{name}_train.json").write_text(json.dumps(train))
        (folder / f"{name}_test.json").write_text(json.dumps(test))
    return folder


def llava_rows() -> list[dict]:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]
    return [{"id": name, "image": f"images/{name}.png", "conversations": turns} for name in "abc"]


def test_rows() -> list[dict]:
    return [
        {"question_id": name, "image": f"images/{name}.png", "text": "Which?", "answer": "red", "type": "colour"}
        for name in "abc"
    ]


def benchmark_values(data: Path) -> dict:
    parts = {name: {"train": f"{data}/{name}_train.json", "test": f"{data}/{name}_test.json"} for name in DOMAINS}
    suites = {"general": {"test": f"{data}/Lamps_test.json", "anchors": f"{data}/Cups_train.json"}}
    defaults = {"scorer": "exact", "prompt_suffix": "\nAnswer briefly.", "max_new_tokens": 4}
    return {
        "name": "own",
        "defaults": defaults,
        "domains": parts,
        "suites": suites,
        "orders": {"back": ["Cups", "Lamps"]},
    }


def run_values(home: Path, data: Path) -> dict:
    return {
        "name": "fuzzed",
        "base": {"model": "tiny-llava", "dtype": "auto"},
        "benchmark": benchmark_values(data),
        "domains": list(DOMAINS),
        "strategy": {"name": "keeplora", "rank": 4, "alpha": 8, "energy_weights": 0.5, "anchors": ["general"]},
        "train": {"lr": 1e-3, "epochs": 1, "batch_size": 4, "args": {"adam_beta2": 0.9}},
        "per_domain": {"Cups": {"train": {"lr": 2e-3}}},
        "eval": {"domains": "seen", "batch_size": 2},
        "plugins": [],
        "seed": 0,
        "output": str(home / "out"),
    }
