"""Medicine: gray scans of the brain, chest and belly, and stained microscope slides, some with a lesion."""

from __future__ import annotations

import math

import numpy as np
from PIL import ImageFilter

from .draw import QUARTERS, Canvas, Sample, pick, vary

ORGANS = ("brain", "chest", "belly", "tissue")
STAINS = {"purple": ((236, 196, 222), (120, 60, 150)), "blue": ((206, 220, 244), (50, 70, 170))}


def _gray(value: int) -> tuple[int, int, int]:
    return (value, value, value)


def _brain(canvas: Canvas, rng) -> None:
    canvas.ellipse(32, 32, 25, 29, _gray(214))
    canvas.ellipse(32, 32, 22, 26, _gray(104))
    canvas.line([(32, 8), (32, 56)], _gray(70), 1.5)
    for side in (-1, 1):
        canvas.ellipse(32 + side * 5, 32, 3, 8, _gray(38))


def _chest(canvas: Canvas, rng) -> None:
    canvas.box(4, 4, 60, 60, _gray(120))
    for side in (-1, 1):
        canvas.ellipse(32 + side * 14, 32, 11, 24, _gray(34))
        for y in range(14, 56, 8):
            canvas.line([(32 + side * 4, y), (32 + side * 25, y - 3)], _gray(92), 1.2)
    canvas.box(29, 4, 35, 60, _gray(196))


def _belly(canvas: Canvas, rng) -> None:
    canvas.ellipse(32, 32, 30, 24, _gray(150))
    canvas.ellipse(32, 32, 27, 21, _gray(92))
    for side in (-1, 1):
        canvas.ellipse(32 + side * 14, 38, 5, 6, _gray(128))
    canvas.ellipse(32, 48, 5, 5, _gray(216))


def _tissue(canvas: Canvas, rng, stain: str) -> None:
    ground, nucleus = STAINS[stain]
    canvas.box(0, 0, 64, 64, vary(rng, ground))
    for x in range(6, 64, 10):
        for y in range(6, 64, 10):
            dx, dy = rng.integers(-2, 3, 2)
            canvas.ellipse(x + dx, y + dy, 2.6, 2.6, vary(rng, nucleus))


def _lesion(canvas: Canvas, rng, x: float, y: float, r: float, tone: str) -> None:
    fill = (252, 252, 248) if tone == "bright" else (4, 4, 6)
    rim = 90 if tone == "bright" else 232
    outline = [
        (x + r * rng.uniform(0.85, 1.15) * math.cos(a), y + r * rng.uniform(0.85, 1.15) * math.sin(a))
        for a in np.linspace(0, 2 * math.pi, 14, endpoint=False)
    ]
    canvas.ellipse(x, y, r + 2, r + 2, _gray(rim))
    canvas.polygon(outline, fill)


def sample(rng: np.random.Generator, held_out: bool = False) -> Sample:
    """Draw one scan or slide."""
    organ, count = pick(rng, ORGANS), int(rng.choice(4, p=(0.3, 0.36, 0.17, 0.17)))
    stain = pick(rng, tuple(STAINS)) if organ == "tissue" else "none"
    tone, extent = pick(rng, ("bright", "dark")), pick(rng, ("small", "large"))
    canvas = Canvas((4, 4, 6))
    if organ == "tissue":
        _tissue(canvas, rng, stain)
    else:
        {"brain": _brain, "chest": _chest, "belly": _belly}[organ](canvas, rng)
    places = [list(QUARTERS)[i] for i in rng.permutation(4)[:count]]
    canvas.image.paste(canvas.image.filter(ImageFilter.GaussianBlur(1.2)))
    for name in places:
        x, y = QUARTERS[name][0] + 16, QUARTERS[name][1] + 16
        x, y = x + (3 if x < 32 else -3) + int(rng.integers(-2, 3)), y + int(rng.integers(-3, 4))
        r = float(rng.uniform(7.5, 9) if extent == "large" else rng.uniform(3.6, 4.6))
        _lesion(canvas, rng, x, y, r, tone)
    qas = [
        ("organ", "what part of the body is shown ?", organ),
        ("exist", "is there a lesion ?", "yes" if count else "no"),
        ("count", "how many lesions are there ?", str(count)),
    ]
    facts = [f"image of {organ}", f"{count} lesions"]
    if organ == "tissue":
        facts.append(f"{stain} stain")
    if count:
        qas.append(("lesion", "what kind of lesion is it ?", f"{extent} {tone}"))
        facts.append(f"{extent} {tone} lesion")
    if count == 1:
        qas.append(("place", "where is the lesion ?", places[0]))
        facts.append(f"lesion {places[0]}")
    return Sample(canvas.finish(rng, 10), qas, facts)
