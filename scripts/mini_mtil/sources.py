"""Pictures and names that packages ship: emoji in five designs, clip art. `fetch.sh` makes the folder of packages."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

DRAWERS = {
    "openmoji": "openmoji/color/svg",
    "fluent": "fluentui-emoji/icons/flat",
    "modern": "fluentui-emoji/icons/modern",
}
SHEETS = {"twemoji": "emoji-datasource-twitter/img/twitter/64", "noto": "emoji-datasource-google/img/google/64"}
CLIP_ART = "openclipart-png/usr/share/openclipart/png"
Image.MAX_IMAGE_PIXELS = None  # one clip art has 231 million
SELECTOR = "FE0F"  # asks for the coloured form of a character; some lists name files with it, others without


@dataclass(frozen=True)
class Emoji:
    """One emoji, with what OpenMoji's table says of it.

    Attributes:
        code: its code points, joined by hyphens, without selectors.
        name: as Unicode calls it; `tags` are Unicode's keywords.
        group, subgroup: e.g. `animals-nature`, `animal-mammal`.
    """

    code: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@cache
def emoji(packages: Path) -> tuple[Emoji, ...]:
    """List the emoji of Unicode without those that differ from another by the tone of a skin alone."""
    rows = json.loads((packages / "openmoji/data/openmoji.json").read_text())
    own = [row for row in rows if not row["skintone"] and not row["group"].startswith("extras")]
    return tuple(
        Emoji(
            _plain(row["hexcode"]),
            row["annotation"],
            tuple(tag.strip() for tag in row["tags"].split(",")),
            row["group"],
            row["subgroups"],
        )
        for row in own
    )


def _plain(code: str) -> str:
    return "-".join(part for part in code.upper().split("-") if part != SELECTOR)


@cache
def _files(packages: Path, design: str) -> dict[str, Path]:
    """Map what a design calls its pictures (code, or name in lower case) to their files."""
    folder = packages / {**DRAWERS, **SHEETS}[design]
    files = sorted(path for path in folder.iterdir() if path.suffix in {".svg", ".png"})
    is_named = folder.is_relative_to(packages / "fluentui-emoji")
    return {path.stem if is_named else _plain(path.stem): path for path in files}


def picture(packages: Path, design: str, one: Emoji, size: int) -> Image.Image | None:
    """Draw an emoji of a design as RGBA of that size; None where the design lacks it."""
    files = _files(packages, design)
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub("[’']", "", one.name.lower())).strip("-")
    path = files.get(one.code) or files.get(slug) or files.get(f"{slug}-default")
    return None if path is None else load(path, size)


def load(path: Path, size: int) -> Image.Image:
    """Read a picture as RGBA; an SVG is drawn twice as large, then all are fitted into a square of that size."""
    if path.suffix == ".svg":
        import resvg_py

        drawn = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * size))
        image = Image.open(io.BytesIO(drawn)).convert("RGBA")
    else:
        image = Image.open(path).convert("RGBA")
    return fitted(image, size)


def fitted(image: Image.Image, size: int) -> Image.Image:
    """Fit an RGBA picture into the middle of a clear square; colours count by how much they cover."""
    image = image.crop(image.getbbox() or (0, 0, 1, 1)).convert("RGBa")
    scale = size / max(image.size)
    shape = tuple(max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBa", (size, size))
    square.paste(
        image.resize(shape, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC),
        tuple((size - side) // 2 for side in shape),
    )
    return square.convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """Lay an RGBA picture on white."""
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def clip_art(packages: Path) -> Iterator[tuple[str, Path]]:
    """Give folder and file of every clip art, in the order of their paths."""
    root = packages / CLIP_ART
    for path in sorted(root.rglob("*.png")):
        yield path.parent.relative_to(root).as_posix(), path
