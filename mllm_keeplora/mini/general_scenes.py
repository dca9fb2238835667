"""General pictures without loose objects: textures, lines, trends, bars, digits, arrows, half-filled discs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .draw import COLORS, QUARTERS, SHAPES, TEXTURES, Canvas, Color, Sample, digit_mask, pick, pick_some, vary

BACKGROUNDS: dict[str, Color] = {
    "gray": (188, 188, 192),
    "white": (246, 246, 244),
    "black": (20, 20, 24),
    "pink": (250, 190, 200),
    "brown": (120, 80, 50),
}
KINDS = ("nothing", *SHAPES, *map(str, range(10)), "line", "bar", "arrow", "half")
HUES = ("none", *COLORS, *(b for b in BACKGROUNDS if b not in COLORS))
ATTRIBUTES = (
    *("none", "big", "small", "horizontal", "vertical", "rising", "falling", "flat"),
    *("longest", "shortest", "middle", "up", "down", "left", "right"),
)
CELL = 8
CHANNELS = {
    **{"kind": len(KINDS), "hue": len(HUES), "attribute": len(ATTRIBUTES), "texture": 5, "ground": 14, "count": 7},
    **{"column": CELL, "row": CELL},  # of the centre of what the cell shows; of the cell itself where it shows nothing
}


def new_cells(background: str, count: int, texture: str = "plain") -> np.ndarray:
    """Make the targets of an empty picture: (8, 8, 8) uint8, with CHANNELS along the first axis."""
    cells = np.zeros((len(CHANNELS), CELL, CELL), np.uint8)
    cells[3] = TEXTURES.index(texture)
    cells[4] = HUES.index(background)
    cells[5] = count
    cells[7], cells[6] = np.indices((CELL, CELL))
    return cells


def object_cells(
    cells: np.ndarray, box: tuple[float, float, float, float], kind: int, hue: str, attribute: str
) -> None:
    """Mark the cells whose centre lies within (cx, cy, rx, ry), or the nearest one."""
    cx, cy, rx, ry = box
    centers = np.arange(CELL) * 8 + 4
    xs = np.flatnonzero(np.abs(centers - cx) <= rx)
    ys = np.flatnonzero(np.abs(centers - cy) <= ry)
    xs = xs if len(xs) else np.array([int(np.clip(cx // 8, 0, 7))])
    ys = ys if len(ys) else np.array([int(np.clip(cy // 8, 0, 7))])
    where = np.ix_(ys, xs)
    cells[0][where] = kind
    cells[1][where] = HUES.index(hue)
    cells[2][where] = ATTRIBUTES.index(attribute)
    cells[6][where], cells[7][where] = (int(np.clip(c // 8, 0, CELL - 1)) for c in (cx, cy))


def _ground(rng, exclude: str = "") -> tuple[str, Canvas]:
    name = pick(rng, tuple(b for b in BACKGROUNDS if b != exclude))
    return name, Canvas(vary(rng, BACKGROUNDS[name], 6))


def visible_colors(background: str) -> list[str]:
    """List the colours that stand out against a background."""
    return [c for c in COLORS if c != background and (c, background) != ("purple", "brown")]


def _hues(rng, background: str, count: int) -> list[str]:
    return pick_some(rng, visible_colors(background), count)


def texture_scene(rng: np.random.Generator) -> Sample:
    """Draw four quarters of colour and texture, three of them alike, so that one texture is the main one."""
    main, other = pick_some(rng, TEXTURES, 2)
    odd = pick(rng, tuple(QUARTERS))
    hue, odd_hue = _hues(rng, "", 2)
    canvas, cells = Canvas((0, 0, 0)), new_cells("gray", 0)
    facts, qas = (
        [],
        [("main texture", "what is the main texture ?", main), ("main color", "what is the main color ?", hue)],
    )
    for name, (x, y) in QUARTERS.items():
        kind, color = (other, odd_hue) if name == odd else (main, hue)
        fill = vary(rng, COLORS[color])
        dark = sum(fill) < 240
        ink = tuple(min(255, c + 110) for c in fill) if dark else tuple(int(c * 0.5) for c in fill)
        canvas.texture(x, y, 32, kind, fill, ink, rng)
        rows, cols = slice(y // 8, y // 8 + 4), slice(x // 8, x // 8 + 4)
        cells[3, rows, cols], cells[4, rows, cols] = TEXTURES.index(kind), HUES.index(color)
        facts.append(f"{color} {kind} {name}")
        qas.append(("quarter texture", f"what texture is the {name} quarter ?", kind))
        qas.append(("quarter color", f"what color is the {name} quarter ?", color))
    qas.append(("odd quarter", "which quarter is different ?", odd))
    return Sample(canvas.finish(rng), qas, facts, cells)


def line_scene(rng: np.random.Generator) -> Sample:
    """Draw one to three parallel lines, or a single slanted one."""
    background, canvas = _ground(rng)
    way = pick(rng, ("horizontal", "vertical", "rising", "falling"))
    count = int(rng.integers(1, 4)) if way in ("horizontal", "vertical") else 1
    hue, width = _hues(rng, background, 1)[0], float(rng.uniform(2.5, 6))
    cells = new_cells(background, count)
    for at in sorted(pick_some(rng, (10, 24, 38, 52), count)):
        at += int(rng.integers(-2, 3))
        low, high = int(rng.integers(0, 8)), int(rng.integers(56, 65))
        ends = {
            "horizontal": [(low, at), (high, at)],
            "vertical": [(at, low), (at, high)],
            "rising": [(low, high), (high, low)],
            "falling": [(low, low), (high, high)],
        }[way]
        canvas.line(ends, vary(rng, COLORS[hue]), width)
        _line_cells(cells, ends, hue, way)
    plain = "diagonal" if way in ("rising", "falling") else way
    qas = [
        ("line way", "which way does the line run ?", plain),
        ("line color", "what color is the line ?", hue),
        ("background", "what color is the background ?", background),
    ]
    if plain != "diagonal":
        qas.append(("line count", "how many lines are there ?", str(count)))
    return Sample(canvas.finish(rng), qas, [f"{count} {hue} {plain} line", f"{background} background"], cells)


def _line_cells(cells: np.ndarray, ends, hue: str, attribute: str) -> None:
    (x0, y0), (x1, y1) = ends
    for t in np.linspace(0, 1, 33):
        box = (x0 + t * (x1 - x0), y0 + t * (y1 - y0), 0, 0)
        object_cells(cells, box, KINDS.index("line"), hue, attribute)


def trend_scene(rng: np.random.Generator) -> Sample:
    """Draw a bent line that goes up, goes down or stays flat from left to right."""
    background, canvas = _ground(rng)
    way = pick(rng, ("up", "down", "flat"))
    hue = _hues(rng, background, 1)[0]
    span = {"up": -1, "down": 1, "flat": 0}[way] * rng.uniform(26, 44)
    middle = rng.uniform(30, 34) if span else rng.uniform(14, 50)
    xs = np.linspace(4, 60, 7)
    ys = np.clip(middle + np.linspace(-0.5, 0.5, 7) * span + rng.uniform(-3, 3, 7), 4, 60)
    canvas.line(list(zip(xs, ys, strict=True)), vary(rng, COLORS[hue]), float(rng.uniform(2, 4)))
    cells = new_cells(background, 1)
    for i in range(6):
        ends = ((xs[i], ys[i]), (xs[i + 1], ys[i + 1]))
        _line_cells(cells, ends, hue, {"up": "rising", "down": "falling", "flat": "flat"}[way])
    qas = [
        ("trend", "does the line go up or down ?", way),
        ("line color", "what color is the line ?", hue),
        ("background", "what color is the background ?", background),
    ]
    return Sample(canvas.finish(rng), qas, [f"{hue} line goes {way}", f"{background} background"], cells)


def bar_scene(rng: np.random.Generator) -> Sample:
    """Draw two to five loose bars of clearly different lengths, standing or lying."""
    background, canvas = _ground(rng)
    count, lying = int(rng.integers(2, 6)), bool(rng.random() < 0.4)
    hues = _hues(rng, background, count)
    lengths = [12 + 40 * (i + rng.uniform(-0.12, 0.12)) / (count - 1) for i in range(count)]
    lengths = [lengths[i] for i in rng.permutation(count)]
    pitch, start = 60 / count, 2
    offset = float(rng.uniform(2, 5)) if rng.random() < 0.5 else None
    cells = new_cells(background, count)
    facts = []
    for i, (hue, length) in enumerate(zip(hues, lengths, strict=True)):
        low = start + i * pitch + pitch * 0.15
        high = low + min(12.0, pitch * 0.7)
        near = offset if offset is not None else float(rng.uniform(1, 62 - length))
        x0, y0, x1, y1 = (near, low, near + length, high) if lying else (low, 64 - near - length, high, 64 - near)
        canvas.box(x0, y0, x1, y1, vary(rng, COLORS[hue]))
        rank = "longest" if length == max(lengths) else "shortest" if length == min(lengths) else "middle"
        box = ((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2)
        object_cells(cells, box, KINDS.index("bar"), hue, rank)
        facts.append(f"{rank} bar {hue}")
    longest, shortest = hues[lengths.index(max(lengths))], hues[lengths.index(min(lengths))]
    a, b = pick_some(rng, range(count), 2)
    qas = [
        ("longest", "which bar is longest ?", longest),
        ("shortest", "which bar is shortest ?", shortest),
        ("bar count", "how many bars are there ?", str(count)),
    ]
    if {lengths[a], lengths[b]} & {max(lengths), min(lengths)}:
        answer = hues[a] if lengths[a] > lengths[b] else hues[b]
        qas.append(("longer", f"which bar is longer , the {hues[a]} or the {hues[b]} ?", answer))
    return Sample(canvas.finish(rng), qas, [*facts, f"{background} background"], cells)


def digit_scene(rng: np.random.Generator, held_out: bool) -> Sample:
    """Draw one large hand-written digit, or two side by side."""
    background, canvas = _ground(rng)
    count = 1 if rng.random() < 0.6 else 2
    hues, values = _hues(rng, background, count), [int(v) for v in rng.integers(0, 10, count)]
    cells = new_cells(background, count)
    for i, (hue, value) in enumerate(zip(hues, values, strict=True)):
        side = int(rng.integers(30, 46)) if count == 1 else int(rng.integers(25, 31))
        x = int(rng.integers(2, 62 - side)) if count == 1 else 1 + 32 * i + int(rng.integers(0, 31 - side + 1))
        y = int(rng.integers(2, 62 - side))
        mask = digit_mask(rng, value, side, held_out)
        canvas.paste(Image.new("RGB", mask.size, vary(rng, COLORS[hue])), x, y, mask)
        box = (x + side / 2, y + side / 2, side * 0.45, side * 0.5)
        object_cells(cells, box, KINDS.index(str(value)), hue, "big")
    background_qa = ("background", "what color is the background ?", background)
    if count == 1:
        qas = [
            ("digit", "what number is it ?", str(values[0])),
            ("digit color", "what color is the number ?", hues[0]),
            background_qa,
        ]
        facts = [f"{hues[0]} number {values[0]}"]
    else:
        qas, facts = [background_qa], []
        for side_name, hue, value in zip(("left", "right"), hues, values, strict=True):
            qas.append(("digit of side", f"what number is on the {side_name} ?", str(value)))
            qas.append(("digit color", f"what color is the {side_name} number ?", hue))
            facts.append(f"{hue} number {value} {side_name}")
    qas.append(("digit count", "how many numbers are there ?", str(count)))
    return Sample(canvas.finish(rng), qas, [*facts, f"{background} background"], cells)


def arrow_scene(rng: np.random.Generator) -> Sample:
    """Draw one thick arrow."""
    background, canvas = _ground(rng)
    way, hue = pick(rng, ("up", "down", "left", "right")), _hues(rng, background, 1)[0]
    length = float(rng.uniform(24, 44))
    x, y = rng.uniform(length / 2, 64 - length / 2, 2)
    canvas.arrow(x, y, length, way, vary(rng, COLORS[hue]), float(rng.uniform(3, 6)))
    cells = new_cells(background, 1)
    wide = length / 2 if way in ("left", "right") else 4
    tall = length / 2 if way in ("up", "down") else 4
    object_cells(cells, (x, y, wide, tall), KINDS.index("arrow"), hue, way)
    qas = [
        ("arrow", "which way does the arrow point ?", way),
        ("arrow color", "what color is the arrow ?", hue),
        ("background", "what color is the background ?", background),
    ]
    return Sample(canvas.finish(rng), qas, [f"{hue} arrow points {way}", f"{background} background"], cells)


def half_scene(rng: np.random.Generator) -> Sample:
    """Draw a disc with one dark and one bright half, on a bright or dark background."""
    background, canvas = _ground(rng)
    side = pick(rng, ("left", "right", "up", "down"))
    r, (x, y) = float(rng.uniform(14, 24)), rng.uniform(26, 38, 2)
    start = {"left": 90, "right": 270, "up": 180, "down": 0}[side]
    canvas.ellipse(x, y, r + 1, r + 1, (128, 128, 128))
    canvas.ellipse(x, y, r, r, vary(rng, (240, 238, 220)))
    canvas.sector(x, y, r, start, start + 180, vary(rng, (40, 38, 44)))
    cells = new_cells(background, 1)
    object_cells(cells, (x, y, r * 0.9, r * 0.9), KINDS.index("half"), "black", side)
    where = {"left": "left", "right": "right", "up": "top", "down": "bottom"}[side]
    tone = "dark" if background in ("black", "brown") else "bright"
    qas = [
        ("dark side", "which side of the disc is dark ?", where),
        ("tone", "is the picture bright or dark ?", tone),
        ("background", "what color is the background ?", background),
    ]
    return Sample(canvas.finish(rng), qas, [f"disc dark {where}", f"{tone} picture", f"{background} background"], cells)
