"""Writes the miniature benchmark as folders of the MLLM-DCL layout, once, into a cache folder."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from . import ad, fin, general, med, rs, sci
from .cache import Progress, cached
from .draw import Sample

DOMAINS = {"RS": rs, "Med": med, "AD": ad, "Sci": sci, "Fin": fin}
SIZES: dict[str, int] = {"train": 1500, "val": 300, "test": 400, "general": 2000, "anchors": 1024}
# Names the drawn data in cache folders, ledgers and results. It changes when the data does, to any other twelve digits:
# a slow test holds the data to it (tests/unit/mini).
DRAWN = "6036a136d0a5"
SPLITS = ("train", "val", "test")
MOST_TURNS = 3


class _Balance:
    """Picks questions so that types, and the answers of each question text, stay about equally frequent."""

    def __init__(self) -> None:
        self.types: Counter = Counter()
        self.answers: dict[str, Counter] = {}

    def _is_frequent(self, key: str, answer: str) -> bool:
        counts = self.answers.setdefault(key, Counter())
        known = {**counts, answer: counts[answer]}
        return counts[answer] > 1.06 * statistics.median(known.values()) + 1

    def pick(self, rng: np.random.Generator, sample: Sample, most: int) -> list[tuple[str, str, str]]:
        """Choose at most `most` questions of a picture, one of a type, in random order.

        The order is random so that none always follows another. Empty if every question would unbalance the set.
        """
        chosen = []
        for _ in range(most):
            used = {kind for kind, _, _ in chosen}
            options = [
                (self.types[kind], rng.random(), (kind, question, answer))
                for kind, question, answer in sample.qas
                if kind not in used and not self._is_frequent(question, answer) and not self._is_frequent(kind, answer)
            ]
            if not options:
                break
            kind, question, answer = min(options)[2]
            self.types[kind] += 1
            self.answers[question][answer] += 1
            if kind != question:
                self.answers[kind][answer] += 1
            chosen.append((kind, question, answer))
        return [chosen[i] for i in rng.permutation(len(chosen))]


def _pictures(draw: Callable[..., Sample], seed: tuple[int, int], count: int, most: int, held_out: bool):
    """Yield (image, chosen questions) `count` times."""
    balance, attempt = _Balance(), 0
    for _ in range(count):
        chosen = []
        while not chosen:
            rng = np.random.default_rng((*seed, attempt))
            sample, attempt = draw(rng, held_out=held_out), attempt + 1
            chosen = balance.pick(rng, sample, most)
        yield sample.image, chosen


def _anchor(rng: np.random.Generator, held_out: bool) -> Sample:
    """Draw a general picture unlike the test set's: every kind of scene as often, at most three objects."""
    scenes = dict.fromkeys(general.SCENES, 1 / len(general.SCENES))
    return general.sample(rng, held_out, most=3, scenes=scenes)


def _train_record(number: str, image: str, qas: list[tuple[str, str, str]]) -> dict:
    turns = []
    for i, (_, question, answer) in enumerate(qas):
        turns.append({"from": "human", "value": question if i else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"question_id": number, "image": image, "conversations": turns}


def _write_split(folder: Path, name: str, pictures, is_train: bool, seen: dict[str, str], tick) -> None:
    records = []
    for i, (image, qas) in enumerate(pictures):
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        assert seen.setdefault(pixels, name) == name, f"a picture of {name} is also in {seen[pixels]}"
        file = f"images/{name}_{i:05d}.png"
        image.save(folder / file, compress_level=1)
        if is_train:
            records.append(_train_record(f"{name}-{i}", file, qas))
        else:
            kind, question, answer = qas[0]
            record = {"question_id": f"{name}-{i}", "image": file, "text": question, "answer": answer, "type": kind}
            records.append(record)
        tick()
    (folder / f"{name}.json").write_text(json.dumps(records, indent=1))


def write_mini_dcl(root: Path, sizes: Mapping[str, int] = SIZES, progress: Progress | None = None) -> None:
    """Draw all domains and the general set into a folder; the same sizes give the same bytes.

    Args:
        root: folder to write `RS/ Med/ AD/ Sci/ Fin/ general/` into.
        sizes: pictures per domain under "train", "val", "test"; of the general set under "general" (its test
            questions) and "anchors" (training-format records for methods that keep general examples).
        progress: called with (pictures done, pictures in total).
    """
    total = len(DOMAINS) * sum(sizes[s] for s in SPLITS) + sizes["general"] + sizes["anchors"]
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for number, (name, module) in enumerate(DOMAINS.items()):
        folder, seen = root / name, {}
        (folder / "images").mkdir(parents=True)
        for part, split in enumerate(SPLITS):
            most = MOST_TURNS if split == "train" else 1
            pictures = _pictures(module.sample, (number, part), sizes[split], most, held_out=split == "test")
            _write_split(folder, split, pictures, split == "train", seen, tick)
    folder, seen = root / "general", {}
    (folder / "images").mkdir(parents=True)
    pictures = _pictures(_anchor, (100, 0), sizes["anchors"], MOST_TURNS, held_out=False)
    _write_split(folder, "anchors", pictures, True, seen, tick)
    pictures = _pictures(general.sample, (100, 1), sizes["general"], 1, held_out=True)
    _write_split(folder, "test", pictures, False, seen, tick)


def generator_hash(sizes: Mapping[str, int] = SIZES) -> str:
    """Name the drawn data by twelve hexadecimal digits; those of the shipped sizes are pinned."""
    if dict(sizes) == SIZES:
        return DRAWN
    return hashlib.sha256((DRAWN + json.dumps(dict(sizes), sort_keys=True)).encode()).hexdigest()[:12]


def ensure_mini_dcl(
    cache_dir: Path | None = None, sizes: Mapping[str, int] = SIZES, progress: Progress | None = None
) -> Path:
    """Find the folder of the miniature benchmark; it is drawn first if it is not there yet.

    Args:
        cache_dir: default `$MLLM_KEEPLORA_CACHE`, else `~/.cache/mllm_keeplora`.
        sizes: as in `write_mini_dcl`.
        progress: as in `write_mini_dcl`; not called if the folder exists.
    """
    return cached(
        f"mini_dcl-{generator_hash(sizes)}", lambda folder: write_mini_dcl(folder, sizes, progress), cache_dir
    )
