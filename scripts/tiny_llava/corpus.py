"""The pre-training corpus on disk: general pictures with cell targets and tokenised questions, and text-only twins."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np

from mllm_keeplora.mini import ad, fin, general, med, rs, sci
from mllm_keeplora.mini.draw import Sample
from mllm_keeplora.mini.general_scenes import CHANNELS
from mllm_keeplora.mini.vocabulary import ASSISTANT, EOS, USER, vocabulary

from .mosaic import mosaic

DOMAINS = {"rs": rs, "med": med, "ad": ad, "sci": sci, "fin": fin}
DESCRIBE = "describe the picture ?"
SCENES = {
    **{"quarters": 0.26, "slots": 0.27, "texture": 0.07, "line": 0.06, "trend": 0.05, "bar": 0.1},
    **{"digit": 0.13, "arrow": 0.03, "half": 0.03},  # more of what is hard to read than in the general set
}
EASY_SHARE = 0.1  # the first tenth of the pictures holds one object, the second at most two


def encode(text: str, ids: dict[str, int]) -> list[int]:
    """Token ids of a text made of known words."""
    return [ids[word] for word in text.split()]


def encode_qa(question: str, answer: str, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Prompt ids (user question assistant) and target ids (answer, end)."""
    return encode(f"{USER} {question} {ASSISTANT}", ids), encode(f"{answer} {EOS}", ids)


def caption(sample: Sample) -> str:
    """All facts of a picture as one text."""
    return " . ".join(sample.facts)


def _draw_part(part: int, num_parts: int, total: int, seed: int, folder: Path) -> None:
    ids = {token: i for i, token in enumerate(vocabulary())}
    pixels = np.load(folder / "pixels.npy", mmap_mode="r+")
    cells = np.load(folder / "cells.npy", mmap_mode="r+")
    records = []
    for i in range(part, total, num_parts):
        rng = np.random.default_rng((seed, i))
        most = 1 if i < total * EASY_SHARE else 2 if i < total * 2 * EASY_SHARE else 5
        sample = general.sample(rng, most=most, scenes=SCENES)
        pixels[i], cells[i] = np.asarray(sample.image), sample.cells
        qas = [(kind, *encode_qa(q, a, ids)) for kind, q, a in sample.qas]
        qas.append(("describe", *encode_qa(DESCRIBE, caption(sample), ids)))
        records.append([i, encode(caption(sample), ids), qas])
    (folder / f"qas_{part}.json").write_text(json.dumps(records))
    pixels = np.load(folder / "mosaic_pixels.npy", mmap_mode="r+")
    cells = np.load(folder / "mosaic_cells.npy", mmap_mode="r+")
    for i in range(part, len(pixels), num_parts):
        image, cells[i] = mosaic(np.random.default_rng((seed, 77, i)))
        pixels[i] = np.asarray(image)


def _draw_twins(count: int, seed: int, folder: Path) -> None:
    ids = {token: i for i, token in enumerate(vocabulary())}
    records = []
    for number, module in enumerate(DOMAINS.values()):
        for i in range(count):
            sample = module.sample(np.random.default_rng((seed, 1 + number, i)))
            records.append([encode(caption(sample), ids), [encode_qa(q, a, ids) for _, q, a in sample.qas]])
    (folder / "twins.json").write_text(json.dumps(records))


class Corpus:
    """Drawn once, then read.

    Attributes:
        pixels, cells: (n, 64, 64, 3) and (n, channels, 8, 8) uint8 of the general pictures.
        facts, qas: token ids that go with them.
        mosaic_pixels, mosaic_cells: the same of pictures without questions, for the tower alone.
        twins: token ids of the domains' facts with their questions.
    """

    def __init__(self, folder: Path, total: int, num_twins: int, seed: int = 20):
        if not (folder / "done").exists():
            self._draw(folder, total, num_twins, seed)
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.cells = np.load(folder / "cells.npy", mmap_mode="r")
        self.mosaic_pixels = np.load(folder / "mosaic_pixels.npy", mmap_mode="r")
        self.mosaic_cells = np.load(folder / "mosaic_cells.npy", mmap_mode="r")
        self.facts: list[list[int]] = [[]] * total
        self.qas: list[list] = [[]] * total
        for path in sorted(folder.glob("qas_*.json")):
            for i, facts, qas in json.loads(path.read_text()):
                self.facts[i], self.qas[i] = facts, qas
        self.twins = json.loads((folder / "twins.json").read_text())
        self.kinds = sorted({kind for qas in self.qas for kind, _, _ in qas})

    def __len__(self) -> int:
        return len(self.qas)

    @staticmethod
    def _draw(folder: Path, total: int, num_twins: int, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for prefix, count in (("", total), ("mosaic_", total)):
            for name, shape in (("pixels", (64, 64, 3)), ("cells", (len(CHANNELS), 8, 8))):
                np.lib.format.open_memmap(folder / f"{prefix}{name}.npy", "w+", np.uint8, (count, *shape)).flush()
        jobs = [multiprocessing.Process(target=_draw_part, args=(p, 2, total, seed, folder)) for p in range(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
            assert job.exitcode == 0
        _draw_twins(num_twins, seed, folder)
        (folder / "done").touch()
