"""Rows for the language model: several independent questions on one image, ordinary turns, or text only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllm_keeplora.mini.draw import SHAPES
from mllm_keeplora.mini.vocabulary import BOS, CHARACTERS, IMAGE, PAD, vocabulary

from .corpus import EASY_SHARE, Corpus, encode_qa
from .network import NUM_IMAGE_TOKENS

TOKENS = vocabulary()
IDS = {token: i for i, token in enumerate(TOKENS)}


@dataclass
class Rows:
    """(b, t) ids, positions, targets (-100 = none), question numbers (-1 = none), (b, t, t) mask, row sources."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    kinds: Tensor
    mask: Tensor
    images: list[int]


def pack(prefixes: list[list[int]], qas: list[list[tuple]], apart: bool, images: list[int]) -> Rows:
    """Lay out rows: a prefix, then question-answer pairs which, if `apart`, see the prefix and themselves only.

    Args:
        prefixes: token ids that open each row.
        qas: per row (kind number, prompt ids, target ids).
        apart: True makes the pairs independent, each at the same positions; False makes them turns of one talk.
        images: the picture of each row, empty for text-only rows.
    """
    lengths = [len(p) + sum(len(q) + len(a) for _, q, a in row) for p, row in zip(prefixes, qas, strict=True)]
    b, t = len(prefixes), max(lengths)
    ids = np.full((b, t), IDS[PAD], np.int64)
    positions, targets = np.zeros((b, t), np.int64), np.full((b, t), -100, np.int64)
    kinds, segments = np.full((b, t), -1, np.int64), np.full((b, t), -1, np.int64)
    for r, (prefix, row) in enumerate(zip(prefixes, qas, strict=True)):
        at = len(prefix)
        ids[r, :at], positions[r, :at], segments[r, :at] = prefix, np.arange(at), 0
        for number, (kind, question, answer) in enumerate(row, start=1):
            end = at + len(question) + len(answer)
            ids[r, at:end] = question + answer
            segments[r, at:end] = number if apart else 0
            start = len(prefix) if apart else at
            positions[r, at:end] = np.arange(start, start + end - at)
            first = at + len(question) - 1
            targets[r, first : end - 1], kinds[r, first : end - 1] = answer, kind
            at = end
    seg = torch.from_numpy(segments)
    same = (seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0)
    mask = same & torch.ones(t, t, dtype=torch.bool).tril() & (seg[:, None, :] >= 0)
    mask |= torch.eye(t, dtype=torch.bool)
    return Rows(*map(torch.from_numpy, (ids, positions, targets, kinds)), mask, images)


class Batches:
    """Draws rows; question types that are answered well are asked less.

    Questions that name a shape are a type for each shape: looking up a circle and a ring was learnt long before the
    other four, and a type for all of them hid that.
    """

    def __init__(self, corpus: Corpus, seed: int):
        self.corpus, self.seed = corpus, seed
        self.types = [(kind, shape) for kind in corpus.kinds for shape in ("", *SHAPES)]
        self.number = {name: i for i, name in enumerate(self.types)}
        self.right = torch.full((len(self.types),), 0.3)
        self.opening = [IDS[BOS], *[IDS[IMAGE]] * NUM_IMAGE_TOKENS]

    def update(self, kinds: Tensor, right: Tensor) -> None:
        """Follow the running share of right answer tokens per question type."""
        for kind in kinds.unique().tolist():
            share = right[kinds == kind].float().mean()
            self.right[kind] += 0.05 * (share - self.right[kind])

    def type_of(self, kind: str, question: list[int]) -> int:
        """Number of a question's type: its kind, and the shape that it names, if any."""
        return self.number[kind, next((TOKENS[i] for i in question if TOKENS[i] in SHAPES), "")]

    def worst(self, count: int) -> str:
        """The types asked about so far that are answered worst, with their shares."""
        asked = [i for i in self.right.argsort().tolist() if self.right[i] != 0.3]
        return ", ".join(f"{' '.join(self.types[i]).strip()} {100 * self.right[i]:.0f}" for i in asked[:count])

    def image_rows(self, step: int, progress: float, size: int, per_image: int) -> Rows:
        """Rows of general pictures; in the first sixth of the training mostly pictures with one or two objects."""
        rng = np.random.default_rng((self.seed, step))
        total = len(self.corpus)
        chosen = rng.integers(0, total, size)
        if progress < 0.15:
            easy = rng.random(size) < 0.7 * (1 - progress / 0.15)
            chosen = np.where(easy, rng.integers(0, int(2 * EASY_SHARE * total), size), chosen)
        apart = rng.random() < 0.75
        rows = []
        for i in chosen:
            qas = self.corpus.qas[i]
            numbers = np.array([self.type_of(kind, question) for kind, question, _ in qas])
            weights = (1.08 - self.right.numpy()[numbers]) / np.sqrt(np.bincount(numbers)[numbers])
            weights[numbers == self.number["describe", ""]] = 0.15 if apart else 0.0
            keys = np.log(weights + 1e-9) + rng.gumbel(size=len(qas))
            picks = np.argsort(-keys)[: per_image if apart else 3]
            rows.append([(int(numbers[p]), qas[p][1], qas[p][2]) for p in picks])
        return pack([self.opening] * size, rows, apart, chosen.tolist())

    def text_rows(self, step: int, size: int) -> Rows:
        """Rows of facts with questions: a third general, the rest of the domains, a few that repeat spelled words."""
        rng = np.random.default_rng((self.seed, 1, step))
        prefixes, rows = [], []
        for _ in range(size):
            kind = rng.random()
            if kind < 0.06:
                letters = rng.choice(list(CHARACTERS), int(rng.integers(1, 7)))
                word = " ".join(c if i == 0 else f"##{c}" for i, c in enumerate(letters))
                prefixes.append([IDS[BOS]])
                rows.append([(-1, *encode_qa(f"repeat {word} ?", word, IDS))])
                continue
            if kind < 0.36:
                i = int(rng.integers(len(self.corpus)))
                facts, qas = self.corpus.facts[i], [(q, a) for name, q, a in self.corpus.qas[i] if name != "describe"]
            else:
                facts, qas = self.corpus.twins[int(rng.integers(len(self.corpus.twins)))]
            picks = rng.permutation(len(qas))[:5]
            prefixes.append([IDS[BOS], *facts])
            rows.append([(-1, *qas[p]) for p in picks])
        return pack(prefixes, rows, True, [])
