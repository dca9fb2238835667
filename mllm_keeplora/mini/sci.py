"""Science: textbook drawings on cream paper: atoms, forces, the moon, figures, maps, circuits, plants."""

from __future__ import annotations

import math

import numpy as np

from .draw import COLORS, Canvas, Sample, photo_patch, pick, pick_some, vary

INK = (40, 40, 60)
SIDES = {"triangle": 3, "square": 4, "hexagon": 6, "circle": 0}
MAP_COLORS = ("red", "green", "blue", "yellow")
PARTS = {"north": (32, 12), "south": (32, 52), "west": (12, 32), "east": (52, 32)}


def _atom(canvas: Canvas, rng):
    count, charge = int(rng.integers(1, 5)), pick(rng, ("red", "blue"))
    r, turn = float(rng.uniform(20, 24)), float(rng.uniform(0, 2 * math.pi))
    canvas.ellipse(32, 32, r, r, None, INK, 1.2)
    canvas.ellipse(32, 32, 8, 8, vary(rng, COLORS[charge]))
    for i in range(count):
        angle = turn + 2 * math.pi * i / count
        canvas.ellipse(32 + r * math.cos(angle), 32 + r * math.sin(angle), 5, 5, INK)
    sign = {"red": "positive", "blue": "negative"}[charge]
    qas = [("electrons", "how many electrons does the atom have ?", str(count))]
    return qas, [f"{count} electrons", f"{charge} core so {sign}"]


def _force(canvas: Canvas, rng):
    way, heavy = pick(rng, ("up", "down", "left", "right")), bool(rng.random() < 0.5)
    dx, dy = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}[way]
    side = 11 if heavy else 6
    x, y = 32 - dx * 14, 32 - dy * 14
    canvas.box(x - side, y - side, x + side, y + side, (206, 204, 212), outline=INK)
    canvas.arrow(x + dx * (side + 13), y + dy * (side + 13), 25, way, INK, 4)
    mass = "heavy" if heavy else "light"
    return [("force", "in which direction does the force act ?", way)], [f"force {way}", f"{mass} block"]


def _moon(canvas: Canvas, rng):
    side = pick(rng, ("left", "right"))
    canvas.box(4, 4, 60, 60, (26, 28, 58))
    canvas.ellipse(32, 32, 20, 20, (70, 70, 82))
    canvas.sector(32, 32, 20, 90 if side == "left" else 270, 270 if side == "left" else 450, vary(rng, (244, 240, 200)))
    return [("moon", "which side of the moon is lit ?", side)], [f"moon lit {side}"]


def _figure(canvas: Canvas, rng):
    kind, r, turn = pick(rng, tuple(SIDES)), float(rng.uniform(18, 24)), float(rng.uniform(-0.15, 0.15))
    if kind == "circle":
        canvas.ellipse(32, 32, r, r, (232, 226, 206), INK, 2.5)
    else:
        n = SIDES[kind]
        first = -math.pi / 2 + turn + (math.pi / n if n == 4 else 0)
        angles = [first + 2 * math.pi * i / n for i in range(n)]
        points = [(32 + r * math.cos(a), 34 + r * math.sin(a)) for a in angles]
        canvas.polygon(points, (232, 226, 206), INK, 2.5)
    return [("figure", "which figure is drawn ?", kind)], [f"figure {kind}"]


def _map(canvas: Canvas, rng):
    colors = dict(zip(PARTS, pick_some(rng, MAP_COLORS, 4), strict=True))
    corners = {"north": ((4, 4), (60, 4)), "east": ((60, 4), (60, 60)), "south": ((60, 60), (4, 60))}
    corners["west"] = ((4, 60), (4, 4))
    for part, color in colors.items():
        canvas.polygon([*corners[part], (32, 32)], vary(rng, COLORS[color]), INK, 1.2)
    qas = [("map", f"what color is the {part} of the map ?", colors[part]) for part in ("north", "south")]
    return qas, [f"{part} {color}" for part, color in colors.items()]


def _circuit(canvas: Canvas, rng):
    lit, count = bool(rng.random() < 0.5), int(rng.integers(1, 4))
    canvas.line([(10, 18), (54, 18), (54, 54)], INK, 1.6)
    canvas.line([(10, 18), (10, 54), (54, 54)], INK, 1.6)
    if lit:
        canvas.ellipse(32, 18, 16, 16, (255, 244, 150))
    canvas.ellipse(32, 18, 10, 10, (255, 214, 20) if lit else (70, 70, 84), INK, 1.4)
    for i in range(count):
        x = 32 + (i - (count - 1) / 2) * 14
        canvas.box(x - 4.5, 47, x + 4.5, 61, (60, 110, 70), outline=INK)
    answer = "yes" if lit else "no"
    return [("lamp", "is the lamp on ?", answer)], [f"lamp on {answer}", f"{count} cells"]


def _specimen(canvas: Canvas, rng, held_out: bool):
    part = pick(rng, ("leaf", "root"))
    canvas.paste(photo_patch(rng, 56, held_out).point(lambda v: 150 + v // 3), 4, 4)
    if part == "leaf":
        canvas.ellipse(32, 26, 11, 19, vary(rng, (40, 140, 50)))
        canvas.line([(32, 8), (32, 59)], (20, 80, 30), 2)
    else:
        canvas.line([(32, 5), (32, 30)], (20, 110, 40), 3)
        for x in (12, 22, 32, 42, 52):
            canvas.line([(32, 30), (x, 58)], (120, 76, 40), 3)
    return [], [f"plant {part}"]


TOPICS = {"atom": _atom, "force": _force, "moon": _moon, "figure": _figure, "map": _map, "circuit": _circuit}


def sample(rng: np.random.Generator, held_out: bool = False) -> Sample:
    """Draw one textbook figure; `held_out` takes the photographs' other part."""
    topic = pick(rng, (*TOPICS, "plant"))
    canvas = Canvas(vary(rng, (252, 246, 224), 4))
    if topic == "plant":
        qas, facts = _specimen(canvas, rng, held_out)
    else:
        qas, facts = TOPICS[topic](canvas, rng)
    qas = [*qas, ("topic", "what is the topic of the drawing ?", topic)]
    return Sample(canvas.finish(rng, 4), qas, [*facts, f"topic {topic}"])
