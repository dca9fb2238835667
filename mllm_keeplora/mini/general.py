"""The general set: objects of many shapes and colours. Holds the skills the five domains need, not their look.

Other general pictures (textures, lines, bars, digits, arrows) are in `general_scenes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .draw import COLORS, QUARTERS, SHAPES, Canvas, Sample, photo_patch, pick, pick_some, vary
from .general_scenes import (
    BACKGROUNDS,
    KINDS,
    arrow_scene,
    bar_scene,
    digit_scene,
    half_scene,
    line_scene,
    new_cells,
    object_cells,
    texture_scene,
    trend_scene,
    visible_colors,
)

SCENES = {
    "quarters": 0.26,
    "slots": 0.26,
    "texture": 0.1,
    "line": 0.08,
    "trend": 0.06,
    "bar": 0.08,
    "digit": 0.08,
    "arrow": 0.04,
    "half": 0.04,
}
CENTERS = {name: (x + 16, y + 16) for name, (x, y) in QUARTERS.items()}
ROWS, COLUMNS = {"top": 11, "": 32, "bottom": 53}, {"left": 11, "": 32, "right": 53}
SLOTS = {f"{row} {col}".strip() or "middle": (x, y) for row, y in ROWS.items() for col, x in COLUMNS.items()}


def _background(rng, canvas: Canvas, name: str, held_out: bool) -> bool:
    """Sometimes rule the background or lay a faded photograph over it; True if its colour can still be named."""
    choice = rng.random()
    if choice < 0.12:
        patch = photo_patch(rng, 64, held_out)
        canvas.image.paste(patch.point(lambda v: 120 + v // 4 if name != "black" else v // 5))
    elif choice < 0.3:
        ink = tuple(max(0, c - 22) if c > 60 else c + 26 for c in BACKGROUNDS[name])
        for y in range(2, 64, 8):
            canvas.box(0, y, 64, y + 2, ink)
    return choice >= 0.12


def _objects(rng, places: list[tuple[str, tuple[int, int]]], background: str, jitter: int, repeat: float) -> list[dict]:
    """Draw up attributes: colours and shapes differ between objects except for a share `repeat` of pictures."""
    colors = visible_colors(background)
    distinct = rng.random() >= repeat
    if distinct and len(places) <= len(SHAPES):
        hues, shapes = pick_some(rng, colors, len(places)), pick_some(rng, SHAPES, len(places))
    else:
        hue_pool, shape_pool = pick_some(rng, colors, 2), pick_some(rng, SHAPES, 2)
        hues = [pick(rng, hue_pool) for _ in places]
        shapes = [pick(rng, shape_pool) for _ in places]
    objects = []
    for (name, (x, y)), hue, shape in zip(places, hues, shapes, strict=True):
        size = pick(rng, ("big", "small"))
        r = (rng.uniform(9.5, 11) if size == "big" else rng.uniform(5.2, 6.2)) + (1.5 if jitter > 3 else 0)
        dx, dy = rng.integers(-jitter, jitter + 1, 2)
        cx, cy = float(np.clip(x + dx, r, 64 - r)), float(np.clip(y + dy, r, 64 - r))
        objects.append({"place": name, "x": cx, "y": cy, "r": r, "color": hue, "shape": shape, "size": size})
    return objects


def _count_qas(rng, objects: list[dict]) -> list[tuple[str, str, str]]:
    qas = [("count", "how many objects are there ?", str(len(objects)))]
    if objects:
        color, shape = pick(rng, objects)["color"], pick(rng, objects)["shape"]
        same = str(sum(o["color"] == color for o in objects))
        qas.append(("count color", f"how many {color} objects are there ?", same))
        same = str(sum(o["shape"] == shape for o in objects))
        qas.append(("count shape", f"how many {shape} shapes are there ?", same))
    return qas


def _exist_qas(rng, objects: list[dict], background: str) -> list[tuple[str, str, str]]:
    qas = []
    here = [o["color"] for o in objects]
    gone = [c for c in visible_colors(background) if c not in here]
    yes = bool(here) and rng.random() < 0.5
    qas.append(("exist color", f"is there a {pick(rng, here if yes else gone)} object ?", "yes" if yes else "no"))
    here = [o["shape"] for o in objects]
    gone = [s for s in SHAPES if s not in here]
    if gone:
        yes = bool(here) and rng.random() < 0.5
        qas.append(("exist shape", f"is there a {pick(rng, here if yes else gone)} ?", "yes" if yes else "no"))
    return qas


def _attribute_qas(objects: list[dict]) -> list[tuple[str, str, str]]:
    qas = []
    for o in objects:
        if sum(p["shape"] == o["shape"] for p in objects) == 1:
            qas.append(("color of shape", f"what color is the {o['shape']} ?", o["color"]))
            qas.append(("size of shape", f"is the {o['shape']} big or small ?", o["size"]))
            qas.append(("place of shape", f"where is the {o['shape']} ?", o["place"]))
        if sum(p["color"] == o["color"] for p in objects) == 1:
            qas.append(("shape of color", f"what shape is the {o['color']} object ?", o["shape"]))
            qas.append(("size of color", f"is the {o['color']} object big or small ?", o["size"]))
            qas.append(("place of color", f"where is the {o['color']} object ?", o["place"]))
    return qas


def _relation_qas(objects: list[dict]) -> list[tuple[str, str, str]]:
    """Ask which of two objects, told apart by colour, is further in some direction or bigger; its colour answers."""
    qas = []
    unique = [o for o in objects if sum(p["color"] == o["color"] for p in objects) == 1]
    for a in unique:
        for b in unique:
            if a is b:
                continue
            asked = f"the {a['color']} or the {b['color']} ?"
            for kind, axis, words in (
                ("left or right", "x", ("left", "right")),
                ("above or below", "y", ("above", "below")),
            ):
                if abs(a[axis] - b[axis]) > 12:
                    low, high = (a, b) if a[axis] < b[axis] else (b, a)
                    qas += [
                        (kind, f"which object is {word} , {asked}", o["color"])
                        for word, o in zip(words, (low, high), strict=True)
                    ]
            if a["size"] != b["size"]:
                qas.append(("bigger", f"which object is bigger , {asked}", (a if a["size"] == "big" else b)["color"]))
    return qas


def _object_facts(objects: list[dict], background: str) -> list[str]:
    facts = [f"{o['size']} {o['color']} {o['shape']} {o['place']}" for o in objects]
    return [*facts, f"{background} background"]


def object_scene(rng: np.random.Generator, quarters: bool, held_out: bool, most: int = 5) -> Sample:
    """Draw objects in the four quarters, or anywhere on a loose 3 x 3 grid.

    Args:
        rng: source of all randomness.
        quarters: at most one object in each quarter, so that quarters can be asked about.
        held_out: use the test part of the real pictures.
        most: largest number of objects (a curriculum starts with 1).
    """
    background = pick(rng, tuple(BACKGROUNDS))
    if quarters:
        count = int(rng.integers(1, min(4, most) + 1))
        places = [(name, CENTERS[name]) for name in pick_some(rng, tuple(CENTERS), count)]
        objects = _objects(rng, places, background, 5, 0.15)
    else:
        count = int(rng.integers(0 if most > 1 else 1, most + 1))
        objects = _objects(rng, pick_some(rng, tuple(SLOTS.items()), count), background, 2, 0.45)
    canvas = Canvas(vary(rng, BACKGROUNDS[background], 6))
    plain = _background(rng, canvas, background, held_out)
    cells = new_cells(background, len(objects))
    for o in objects:
        canvas.shape(o["shape"], o["x"], o["y"], o["r"], vary(rng, COLORS[o["color"]]))
        object_cells(cells, (o["x"], o["y"], o["r"], o["r"]), KINDS.index(o["shape"]), o["color"], o["size"])
    qas = [("background", "what color is the background ?", background)] if plain else []
    qas += _attribute_qas(objects) + _relation_qas(objects)
    qas += _count_qas(rng, objects) + _exist_qas(rng, objects, background)
    if quarters:
        for name in QUARTERS:
            here = [o for o in objects if o["place"] == name]
            qas.append(("quarter", f"what is in the {name} quarter ?", here[0]["shape"] if here else "nothing"))
    return Sample(canvas.finish(rng), qas, _object_facts(objects, background), cells)


def sample(
    rng: np.random.Generator, held_out: bool = False, most: int = 5, scenes: Mapping[str, float] = SCENES
) -> Sample:
    """Draw one general picture.

    Args:
        rng: source of all randomness.
        held_out: use the test part of the real pictures (digits, photographs).
        most: largest number of objects in the object scenes.
        scenes: how often each kind of picture is drawn; the shares add up to 1.

    Returns:
        A `Sample` with `cells`.
    """
    scene = str(rng.choice(list(scenes), p=np.array(list(scenes.values()))))
    if scene in ("quarters", "slots"):
        return object_scene(rng, scene == "quarters", held_out, most)
    if scene == "digit":
        return digit_scene(rng, held_out)
    others = {"texture": texture_scene, "line": line_scene, "trend": trend_scene, "bar": bar_scene}
    return {**others, "arrow": arrow_scene, "half": half_scene}[scene](rng)
