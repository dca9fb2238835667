"""Drawing primitives shared by the miniature domains: a supersampled canvas, shapes, textures, real picture patches.

Knows no domain and no question. Coordinates are in final pixels (64 x 64); everything is drawn twice as large,
then reduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SCALE = 2
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (214, 39, 40),
    "green": (34, 160, 60),
    "blue": (44, 70, 205),
    "yellow": (245, 218, 40),
    "orange": (244, 132, 20),
    "purple": (140, 56, 165),
    "white": (250, 250, 250),
    "black": (16, 16, 18),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "striped", "dotted", "checked", "rough")
QUARTERS: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top right": (32, 0),
    "bottom left": (0, 32),
    "bottom right": (32, 32),
}


@dataclass
class Sample:
    """One drawn picture with its questions.

    Attributes:
        image: 64 x 64 RGB.
        qas: (question type, question, answer); a question text stands for one type only.
        facts: short sentences that say in words what the picture shows, enough to answer every question.
        cells: optional (channels, 8, 8) uint8 class targets per 8 x 8 cell, used by the base model's pre-training only.
    """

    image: Image.Image
    qas: list[tuple[str, str, str]]
    facts: list[str]
    cells: np.ndarray | None = field(default=None, repr=False)


def pick(rng: np.random.Generator, options):
    """Choose one of `options` uniformly."""
    return options[int(rng.integers(len(options)))]


def pick_some(rng: np.random.Generator, options, count: int) -> list:
    """Choose `count` different ones of `options`, in random order."""
    return [options[i] for i in rng.permutation(len(options))[:count]]


def shade(color: Color, factor: float) -> Color:
    """Multiply `color` by `factor`, clipped to the byte range."""
    return tuple(int(min(255, max(0, c * factor))) for c in color)


def vary(rng: np.random.Generator, color: Color, amount: int = 10) -> Color:
    """Move each channel of `color` by at most `amount`."""
    return tuple(int(min(255, max(0, c + d))) for c, d in zip(color, rng.integers(-amount, amount + 1, 3), strict=True))


class Canvas:
    """A picture under construction, in final pixel coordinates."""

    def __init__(self, background: Color):
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
        self.pen = ImageDraw.Draw(self.image)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Color, outline: Color | None = None) -> None:
        """Fill a rectangle."""
        self.pen.rectangle(
            (x0 * SCALE, y0 * SCALE, x1 * SCALE - 1, y1 * SCALE - 1), fill=fill, outline=outline, width=SCALE
        )

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill=None, outline=None, width: float = 1) -> None:
        """Fill or outline an ellipse."""
        box = ((cx - rx) * SCALE, (cy - ry) * SCALE, (cx + rx) * SCALE, (cy + ry) * SCALE)
        self.pen.ellipse(box, fill=fill, outline=outline, width=round(width * SCALE))

    def sector(self, cx: float, cy: float, r: float, start: float, end: float, fill: Color, outline=None) -> None:
        """Fill a pie slice between two angles in degrees, clockwise from three o'clock."""
        box = ((cx - r) * SCALE, (cy - r) * SCALE, (cx + r) * SCALE, (cy + r) * SCALE)
        self.pen.pieslice(box, start, end, fill=fill, outline=outline, width=SCALE)

    def polygon(self, points, fill=None, outline=None, width: float = 1) -> None:
        """Fill or outline a polygon."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.polygon(scaled, fill=fill, outline=outline, width=round(width * SCALE))

    def line(self, points, fill: Color, width: float = 1) -> None:
        """Draw a polyline."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(scaled, fill=fill, width=round(width * SCALE), joint="curve")

    def arrow(self, cx: float, cy: float, length: float, direction: str, fill: Color, width: float = 3) -> None:
        """Draw a straight arrow centred at (cx, cy) that points up, down, left or right."""
        dx, dy = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}[direction]
        half, head = length / 2, length * 0.42
        tip = (cx + dx * half, cy + dy * half)
        neck = (tip[0] - dx * head, tip[1] - dy * head)
        self.line([(cx - dx * half, cy - dy * half), neck], fill, width)
        side = head * 0.8
        self.polygon(
            [tip, (neck[0] - dy * side, neck[1] - dx * side), (neck[0] + dy * side, neck[1] + dx * side)], fill
        )

    def paste(self, image: Image.Image, x: int, y: int, mask: Image.Image | None = None) -> None:
        """Paste a picture given in drawing resolution at a position in final pixels."""
        self.image.paste(image, (x * SCALE, y * SCALE), mask)

    def shape(self, kind: str, cx: float, cy: float, r: float, fill: Color) -> None:
        """Draw one of SHAPES within the square of half-width `r`."""
        if kind == "circle":
            self.ellipse(cx, cy, r, r, fill)
        elif kind == "ring":
            self.ellipse(cx, cy, r, r, None, fill, max(2.0, r * 0.36))
        elif kind == "square":
            self.box(cx - r * 0.9, cy - r * 0.9, cx + r * 0.9, cy + r * 0.9, fill)
        elif kind == "cross":
            w = r * 0.34
            self.box(cx - r, cy - w, cx + r, cy + w, fill)
            self.box(cx - w, cy - r, cx + w, cy + r, fill)
        elif kind == "triangle":
            self.polygon([(cx, cy - r), (cx + r, cy + r * 0.85), (cx - r, cy + r * 0.85)], fill)
        elif kind == "star":
            angles = [(-90 + 36 * i) * math.pi / 180 for i in range(10)]
            radii = [r * 1.1 if i % 2 == 0 else r * 0.42 for i in range(10)]
            self.polygon(
                [(cx + q * math.cos(a), cy + q * math.sin(a)) for a, q in zip(angles, radii, strict=True)], fill
            )
        else:
            raise ValueError(f"shape must be one of {SHAPES}, got {kind!r}")

    def texture(self, x0: int, y0: int, size: int, kind: str, fill: Color, ink: Color, rng) -> None:
        """Fill a square region with one of TEXTURES."""
        self.box(x0, y0, x0 + size, y0 + size, fill)
        if kind == "striped":
            for y in range(y0 + 1, y0 + size, 6):
                self.box(x0, y, x0 + size, min(y + 3, y0 + size), ink)
        elif kind == "dotted":
            for x in range(x0 + 4, x0 + size, 8):
                for y in range(y0 + 4, y0 + size, 8):
                    self.ellipse(x, y, 2.2, 2.2, ink)
        elif kind == "checked":
            for i, x in enumerate(range(x0, x0 + size, 4)):
                for y in range(y0 + 4 * (i % 2), y0 + size, 8):
                    self.box(x, y, x + 4, y + 4, ink)
        elif kind == "rough":
            side = size * SCALE // 4
            mask = (rng.random((side, side)) < 0.45).astype(np.uint8) * 255
            patch = Image.fromarray(mask).resize((size * SCALE, size * SCALE), Image.Resampling.NEAREST)
            self.paste(Image.new("RGB", patch.size, ink), x0, y0, patch)
        elif kind != "plain":
            raise ValueError(f"texture must be one of {TEXTURES}, got {kind!r}")

    def finish(self, rng: np.random.Generator, noise: int = 6) -> Image.Image:
        """Reduce to the final size and add uniform noise of at most `noise` grey levels per channel."""
        pixels = np.asarray(self.image.reduce(SCALE), dtype=np.int16)
        grain = rng.integers(-noise, noise + 1, pixels.shape, dtype=np.int16)
        return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def digit_mask(rng: np.random.Generator, value: int, side: int, held_out: bool) -> Image.Image:
    """Draw a hand-written digit as a grey mask of `side` final pixels; the set's first 1400 are for training.

    Training digits are leaned, turned and thickened a little, since 1400 are few; held-out ones stay as written.
    """
    images, targets = _digits()
    positions = np.arange(len(targets))
    allowed = positions[(targets == value) & ((positions >= 1400) if held_out else (positions < 1400))]
    gain = 22.0 if held_out else rng.uniform(16, 30)
    ink = Image.fromarray(np.clip(images[pick(rng, allowed)] * gain, 0, 255).astype(np.uint8))
    mask = ink.resize((side * SCALE, side * SCALE), Image.Resampling.BICUBIC)
    if held_out:
        return mask
    lean, turn, wide, tall = rng.uniform((-0.25, -0.2, 0.9, 0.9), (0.25, 0.2, 1.15, 1.1))
    half = side * SCALE / 2
    rows = np.array([[wide * math.cos(turn), lean - math.sin(turn)], [math.sin(turn), tall * math.cos(turn)]])
    shift = half - rows @ (half, half)
    matrix = (*rows[0], shift[0], *rows[1], shift[1])
    return mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


@lru_cache(maxsize=2)
def _photo(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def photo_patch(rng: np.random.Generator, side: int, held_out: bool) -> Image.Image:
    """Cut a square out of a real photograph, `side` final pixels wide; the right third is for held-out pictures."""
    photo = _photo(pick(rng, ("china", "flower")))
    span = int(rng.integers(100, 200))
    border = photo.width * 2 // 3
    low, high = (border, photo.width - span) if held_out else (0, border - span)
    x, y = int(rng.integers(low, high + 1)), int(rng.integers(0, photo.height - span + 1))
    return photo.resize((side * SCALE, side * SCALE), Image.Resampling.BILINEAR, box=(x, y, x + span, y + span))
