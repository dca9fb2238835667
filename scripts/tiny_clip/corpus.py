"""What `tiny-clip` learns from: emoji, clip art and digits with what they are called, and drawn scenes.

Flags, the folders of domain Clips, the emoji that domain Food is tested on and all of Noto are left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from mini_mtil import names
from mini_mtil.sources import DRAWERS, Emoji, clip_art, emoji, load, picture
from PIL import Image

from mllm_keeplora.mini import general

from .processing import split, vocabulary

STORED = 64  # pixels a side, of which the augmentation makes 48
DESIGNS = (*DRAWERS, "twemoji")
SEED = 31
PROMPTS = ("{}", "{}", "a {}.", "the {}.", "a picture of a {}.", "a photo of a {}.", "a drawing of a {}.",
           "an icon of a {}.", "a clip art of a {}.", "this is a {}.", "a silhouette of a {}.")  # fmt: skip
DIGIT_PROMPTS = ("{}", "the number {}.", "the digit {}.", "a photo of the number {}.", "a {}.")


@dataclass(frozen=True)
class Caption:
    """What a picture may be called.

    Attributes:
        concept: pictures with the same one never meet in a batch.
        names: what it shows; the first is the commonest.
        tags: single words that go with it.
        kind: what it is one of.
        origin: design, folder of clip art, `digits` or `scenes`.
        turns: it may be mirrored.
    """

    concept: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    kind: str
    origin: str
    turns: bool


def emoji_of(packages: Path, design: str) -> list[Emoji]:
    """List the emoji of a design that may be learnt from."""
    tested = {"food-drink"} if design in ("fluent", "modern") else set()  # domain Food's test
    left_out = {"flags", "component", *tested}
    return [one for one in emoji(packages) if one.group not in left_out]


def clips_of(packages: Path) -> list[tuple[str, Path]]:
    """List the clip art that may be learnt from."""
    return [
        (folder, path)
        for folder, path in clip_art(packages)
        if not names.is_kept_out(folder) and "flag" not in path.stem.lower()
    ]


def _emoji_caption(one: Emoji, design: str) -> Caption:
    called = (one.name, *(tag for tag in one.tags if " " in tag))
    sided = {"left", "right"} & set(re.findall("[a-z]+", one.name.lower()))
    return Caption(one.code, called, one.tags, names.kind_of(one), design, one.group != "symbols" and not sided)


def _clip_caption(folder: str, path: Path, known: set[str]) -> Caption:
    """Name a clip art by those words of its file that emoji have, too; the others are mostly their drawers' names."""
    kind = " ".join(dict.fromkeys(split(re.sub(r"[/_-]", " ", "/".join(folder.split("/")[-2:])))))
    own = [word for word in re.findall("[a-z]+", path.stem.lower()) if word in known and len(word) > 2]
    called = (" ".join(own),) if own else (kind,)
    return Caption(f"{folder}/{path.name}", called, tuple(own), kind, folder, True)


def build(packages: Path, output: Path, scenes: int, limit: int | None = None) -> None:
    """Write pictures, captions and vocabulary; `limit` keeps only the first of each source, for a trial."""
    from sklearn.datasets import load_digits

    rows: list[tuple[np.ndarray, Caption]] = []
    known = set(chain.from_iterable(split(" ".join((one.name, *one.tags))) for one in emoji_of(packages, "twemoji")))
    for design in DESIGNS:
        for one in emoji_of(packages, design)[:limit]:
            image = picture(packages, design, one, STORED)
            if image is not None:
                rows.append((np.asarray(image), _emoji_caption(one, design)))
    for folder, path in clips_of(packages)[:limit]:
        rows.append((np.asarray(load(path, STORED)), _clip_caption(folder, path, known)))
    digits = load_digits()
    for i, (pixels, digit) in enumerate(zip(digits.images[:limit], digits.target[:limit], strict=True)):
        ink = Image.fromarray(np.uint8(pixels * 255 / 16)).resize((STORED, STORED), Image.Resampling.BICUBIC)
        clear = Image.new("RGBA", ink.size, "white")
        clear.putalpha(ink)
        called = (names.DIGITS[digit], str(digit))
        rows.append((np.asarray(clear), Caption(f"digit {i}", called, (), "digit", "digits", False)))
    for i in range(scenes):
        sample = general.sample(np.random.default_rng((SEED, i)), most=3)
        image = sample.image.convert("RGBA").resize((STORED, STORED))
        rows.append((np.asarray(image), Caption(f"scene {i}", tuple(sample.facts), (), "scene", "scenes", False)))
    output.mkdir(parents=True, exist_ok=True)
    pixels, captions = zip(*rows, strict=True)
    np.save(output / "pixels.npy", np.stack(pixels))
    taught = chain.from_iterable(split(" ".join((*c.names, *c.tags, c.kind))) for c in captions)
    classes = (names.DIGITS, names.SILHOUETTES, names.TEXTILES.values(), names.CELLS, names.CLIPS, names.SCRIPTS)
    own = " ".join(chain(*classes, names.flags(packages).values(), names.PROMPTS.values(), PROMPTS, DIGIT_PROMPTS))
    (output / "words.json").write_text(json.dumps(vocabulary([*taught, *split(own)])))
    (output / "captions.json").write_text(json.dumps([vars(caption) for caption in captions]))


class Corpus:
    """Pictures with captions, by the kinds of batches that they make.

    Attributes:
        pixels: (n, 64, 64, 4) uint8, colours not multiplied by what they cover.
        tokens: the vocabulary.
    """

    def __init__(self, folder: Path):
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.tokens: list[str] = json.loads((folder / "words.json").read_text())
        self.captions = [
            Caption(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
            for row in json.loads((folder / "captions.json").read_text())
        ]
        origins = np.array([caption.origin for caption in self.captions])
        self.digits, self.scenes = np.flatnonzero(origins == "digits"), np.flatnonzero(origins == "scenes")
        drawn = np.isin(origins, DESIGNS)
        self.clips = np.flatnonzero(~drawn & ~np.isin(origins, ["digits", "scenes"]))
        by_concept: dict[str, list[int]] = {}
        for place in np.flatnonzero(drawn).tolist():
            by_concept.setdefault(self.captions[place].concept, []).append(place)
        self.emoji = list(by_concept.values())

    def batch(self, step: int, size: int) -> tuple[list[int], list[str]]:
        """Choose pictures and a text for each: every sixth batch has scenes, others what was drawn by people."""
        rng = np.random.default_rng((SEED, 1, step))
        if step % 6 == 5:
            chosen = rng.choice(self.scenes, size, replace=False).tolist()
        else:
            counts = size - size // 5 - size // 16, size // 5, size // 16
            concepts = rng.permutation(len(self.emoji))[: counts[0]]
            chosen = [int(rng.choice(self.emoji[concept])) for concept in concepts]
            for group, count in ((self.clips, counts[1]), (self.digits, counts[2])):
                chosen += rng.choice(group, count, replace=False).tolist()
        return chosen, [self._text(self.captions[place], rng) for place in chosen]

    def _text(self, caption: Caption, rng: np.random.Generator) -> str:
        choice = rng.random()
        if caption.origin == "scenes":
            count = min(len(caption.names), 1 + int(rng.integers(2)))
            return " ".join(caption.names[place] for place in rng.permutation(len(caption.names))[:count])
        if caption.origin == "digits":
            return str(rng.choice(DIGIT_PROMPTS)).replace("{}", str(rng.choice(caption.names)))
        if choice < 0.55 or not caption.tags:
            text = caption.names[0] if rng.random() < 0.75 else str(rng.choice(caption.names))
        elif choice < 0.75:
            text = caption.kind
        elif choice < 0.9:
            text = " ".join(rng.permutation(caption.tags)[: 1 + int(rng.integers(2))])
        else:
            text = f"{caption.names[0]} {caption.kind}"
        before, after = str(rng.choice(PROMPTS)).split("{}")
        kept = [word for word in before.split() if rng.random() > 0.2]  # so that no prompt word is needed
        return " ".join((*kept, text)) + after
