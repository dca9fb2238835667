"""Autonomous driving: the view ahead, by day and by night, with a traffic light, cars and people."""

from __future__ import annotations

import numpy as np

from .draw import COLORS, Canvas, Sample, pick, shade, vary

LIGHTS = {"red": "stop", "yellow": "slow down", "green": "drive on"}
CARS = ("red", "blue", "white", "black", "orange")
LANES = {"left": 12, "middle": 32, "right": 52}


def _road(canvas: Canvas, rng, dim: float, night: bool) -> None:
    canvas.box(0, 0, 64, 26, vary(rng, (18, 18, 44) if night else (150, 200, 244)))
    canvas.box(0, 26, 64, 64, shade((92, 150, 78), dim))
    canvas.polygon([(24, 26), (40, 26), (70, 64), (-6, 64)], shade((112, 112, 118), dim))
    for low in (18, 46):
        canvas.line([(32 + (low - 32) * 0.28, 26), (low, 64)], shade((250, 250, 250), max(dim, 0.7)), 1.2)


def _light(canvas: Canvas, x: float, color: str) -> None:
    canvas.box(x - 1, 20, x + 1, 32, (60, 60, 64))
    canvas.box(x - 5, 1, x + 5, 24, (10, 10, 12), outline=(90, 90, 94))
    for i, name in enumerate(LIGHTS):
        canvas.ellipse(x, 5 + 7.4 * i, 3.3, 3.3, COLORS[name] if name == color else (44, 44, 46))


def _car(canvas: Canvas, rng, x: float, y: float, fill) -> None:
    canvas.box(x - 7, y - 9, x + 7, y - 3, fill)
    canvas.box(x - 5, y - 8, x + 5, y - 4, (170, 214, 240))
    canvas.box(x - 9, y - 3, x + 9, y + 4, fill)
    for side in (-1, 1):
        canvas.box(x + side * 6 - 2, y + 4, x + side * 6 + 2, y + 7, (8, 8, 8))


def _person(canvas: Canvas, x: float, dim: float) -> None:
    canvas.ellipse(x, 33, 3.2, 3.2, shade((240, 196, 160), max(dim, 0.75)))
    canvas.box(x - 3.4, 36, x + 3.4, 47, shade((236, 70, 150), max(dim, 0.75)))
    canvas.box(x - 3, 47, x - 0.4, 57, shade((50, 40, 70), max(dim, 0.75)))
    canvas.box(x + 0.4, 47, x + 3, 57, shade((50, 40, 70), max(dim, 0.75)))


def sample(rng: np.random.Generator, held_out: bool = False) -> Sample:
    """Draw one driving scene."""
    night, light = bool(rng.random() < 0.5), pick(rng, tuple(LIGHTS))
    lane, car, person = pick(rng, (*LANES, "none")), pick(rng, CARS), pick(rng, ("left", "right", "none"))
    dim = 0.35 if night else 1.0
    canvas = Canvas((0, 0, 0))
    _road(canvas, rng, dim, night)
    _light(canvas, float(pick(rng, (10, 32, 54)) + rng.integers(-3, 4)), light)
    if person != "none":
        _person(canvas, float({"left": 5, "right": 59}[person] + rng.integers(-1, 2)), dim)
    if lane != "none":
        _car(canvas, rng, LANES[lane] + float(rng.integers(-2, 3)), float(rng.integers(47, 55)), vary(rng, COLORS[car]))
    qas = [
        ("light", "what color is the traffic light ?", light),
        ("action", "what should the driver do ?", LIGHTS[light]),
        ("time", "is it day or night ?", "night" if night else "day"),
        ("lane", "in which lane is the car ahead ?", lane),
        ("person", "on which side is the pedestrian ?", person),
    ]
    facts = [f"{light} traffic light so {LIGHTS[light]}", "night" if night else "day"]
    facts += [f"car ahead {lane}", f"pedestrian {person}"]
    if lane != "none":
        qas.append(("car color", "what color is the car ahead ?", car))
        facts.append(f"{car} car")
    return Sample(canvas.finish(rng), qas, facts)
