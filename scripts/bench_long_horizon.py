"""Sixty domains in a row: room left, what is still learnt, what is forgotten; with and without a bound on what is kept.

    python scripts/bench_long_horizon.py                       both rules, one after the other (an hour on two cores)
    python scripts/bench_long_horizon.py --domains 12          a shorter stream
    python scripts/bench_long_horizon.py plain bounded=0.7     rules by name; bounded=SHARE sets max_kept

Every domain is a made-up script: eight signs (random two-coloured bitmaps) and a word for each; the same words mean
other signs in other domains. The base is the shipped tiny-llava. Runs continue where they stopped. Prints a table and
one JSON object; runs and pictures stay in the folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from mllm_keeplora import load_config, run_sequence
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.report.page import refresh_results

SIGNS, CELLS, SIDE, TRAIN, TEST = 8, 6, 64, 96, 24
WORDS = ("atom", "bar", "belly", "candle", "cross", "desert", "disc", "farmland", "hexagon", "lamp", "leaf", "moon",
         "pie", "road", "root", "star", "tanks", "triangle", "water", "yellow")  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=["plain", "bounded=0.6"], metavar="RULE")
    parser.add_argument("--domains", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/long_horizon"))
    options = parser.parse_args()
    for rule in options.rules:
        if not re.fullmatch(r"plain|bounded=(0?\.\d+|1(\.0)?)", rule):
            parser.error(f"unknown rule {rule!r}; allowed: plain, bounded=SHARE with a share up to 1")
    names = [f"D{number:02d}" for number in range(1, options.domains + 1)]
    for number, name in enumerate(names):
        write_domain(options.folder / "data" / name, number)
    found = {rule: learn(options.folder, rule, names) for rule in options.rules}
    show(found)
    print(json.dumps(found))


def write_domain(folder: Path, number: int) -> None:
    """Eight signs with a word each; every picture shows one of them moved, recoloured a little and noisy."""
    if (folder / "test.json").is_file():
        return
    rng = np.random.default_rng(number)
    signs = rng.integers(0, 2, (SIGNS, CELLS, CELLS))
    colours = rng.integers(40, 216, (SIGNS, 2, 3))
    words = rng.choice(WORDS, SIGNS, replace=False)
    question = f"in the letters {LETTERS[number % 26]} {LETTERS[number // 26]} which word is shown ?"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for part, count in (("train", TRAIN), ("test", TEST)):
        rows = []
        for index in range(count):
            sign, name = index % SIGNS, f"images/{part}{index}.png"
            picture(signs[sign], colours[sign], rng).save(folder / name)
            rows.append(record(part, f"{part}{index}", name, question, str(words[sign])))
        (folder / f"{part}.json").write_text(json.dumps(rows), encoding="utf-8")


def picture(cells: np.ndarray, colours: np.ndarray, rng: np.random.Generator) -> Image.Image:
    size = SIDE // (CELLS + 2)
    bitmap = np.kron(cells, np.ones((size, size), dtype=int))
    canvas = np.zeros((SIDE, SIDE), dtype=int)
    top, left = rng.integers(0, SIDE - bitmap.shape[0] + 1, 2)
    canvas[top : top + bitmap.shape[0], left : left + bitmap.shape[1]] = bitmap
    pixels = colours[canvas] + rng.normal(0, 8, (SIDE, SIDE, 3)) + rng.integers(-12, 13)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def record(part: str, identity: str, image: str, question: str, word: str) -> dict[str, Any]:
    if part == "test":
        return {"question_id": identity, "image": image, "text": question, "answer": word}
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": word}]
    return {"id": identity, "image": image, "conversations": turns}


def learn(folder: Path, rule: str, names: list[str]) -> dict[str, Any]:
    """Run the stream under one rule; where it cannot go on, what it reached by then and why it ended."""
    kind, _, share = rule.partition("=")
    bound = float(share) if kind == "bounded" else None
    output = folder / f"{rule.replace('=', '-')}-{len(names)}"
    config = load_config("mini_dcl", [f"{key}={json.dumps(value)}" for key, value in {
        "name": kind, "output": str(output),
        "benchmark": {"name": "long_horizon", "defaults": {"scorer": "exact", "max_new_tokens": 4}, "domains": {
            name: {"train": f"{folder}/data/{name}/train.json", "test": f"{folder}/data/{name}/test.json"}
            for name in names
        }},
        "strategy": {"name": "keeplora", "rank": 16, "alpha": 32, "grad_samples": 48, "feature_samples": 48,
                     "max_kept": bound},
        "train": {"lr": 4e-3, "epochs": 4, "batch_size": 16, "probe_batch_size": 24, "warmup_ratio": 0.05},
        "eval": {"domains": "seen", "zero_shot": False, "batch_size": 120}, "diagnostics": {"samples": 2},
    }.items()])  # fmt: skip
    ended = None
    try:
        results = run_sequence(config)
    except UserError as error:
        ended = str(error)
        results = refresh_results(load_run(output))
    matrix = [[cell for cell in row if cell is not None] for row in results.score_matrix]
    matrix = [row for row in matrix if row]
    kept = []
    for path in sorted((output / "domains").glob("*/diagnostics.json"))[: len(matrix)]:
        layers = json.loads(path.read_text("utf-8"))["capacity"].values()
        kept.append(statistics.fmean(1 - layer["free"] / layer["d_in"] for layer in layers))
    return {"scores": matrix, "kept": kept, "ended": ended}


def show(found: dict[str, dict[str, Any]]) -> None:
    """Per rule, every tenth of the stream: room, the newest domains' scores, those of all learnt, and of the first."""
    table = Table("rule", "domains", "kept", "learnt anew", "all so far", "change since learnt")
    for rule, facts in found.items():
        scores = facts["scores"]
        for count in sorted({round(len(scores) * tenth / 10) for tenth in range(1, 11)} - {0}):
            new = [scores[i][i] for i in range(max(0, count - 6), count)]
            row = scores[count - 1]
            change = [row[i] - scores[i][i] for i in range(count - 1)]
            table.add_row(
                rule, str(count), f"{facts['kept'][count - 1]:.0%}", f"{statistics.fmean(new):.1f}",
                f"{statistics.fmean(row):.1f}", f"{statistics.fmean(change):+.1f}" if change else "",
            )  # fmt: skip
        if facts["ended"]:
            table.add_row(rule, f"ended after {len(scores)}", facts["ended"])
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
