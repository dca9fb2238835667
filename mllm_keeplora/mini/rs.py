"""Remote sensing: land seen from above. Real photographs serve as the texture of forest and water."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .draw import COLORS, QUARTERS, Canvas, Sample, photo_patch, pick, pick_some, vary

COVERS = ("forest", "water", "farmland", "desert", "city")
ROOFS = ("red", "blue", "green", "white")
ROADS = ("horizontal", "vertical", "diagonal", "none")


def _cover(canvas: Canvas, rng, name: str, x: int, y: int, held_out: bool) -> None:
    """Fill one quarter with a land cover."""
    if name == "forest":
        patch = photo_patch(rng, 32, held_out).convert("L").point(lambda v: v // 4)
        canvas.paste(Image.merge("RGB", (patch, patch.point(lambda v: v + 62), patch)), x, y)
        for cx, cy in rng.integers(3, 30, (14, 2)):
            canvas.ellipse(x + cx, y + cy, 2.6, 2.6, vary(rng, (16, 58, 22)))
    elif name == "water":
        patch = photo_patch(rng, 32, held_out).convert("L").point(lambda v: v // 8)
        canvas.paste(Image.merge("RGB", (patch, patch.point(lambda v: v + 62), patch.point(lambda v: v + 128))), x, y)
    elif name == "farmland":
        canvas.texture(x, y, 32, "striped", vary(rng, (176, 178, 72)), (118, 136, 44), rng)
    elif name == "desert":
        canvas.box(x, y, x + 32, y + 32, vary(rng, (222, 184, 134)))
        for cy in range(y + 5, y + 32, 11):
            canvas.line([(x + 3, cy), (x + 14, cy - 3), (x + 28, cy)], (200, 158, 108), 1.2)
    else:
        canvas.box(x, y, x + 32, y + 32, (134, 132, 136))
        for cx in range(x + 2, x + 31, 8):
            for cy in range(y + 2, y + 31, 8):
                canvas.box(cx, cy, cx + 5, cy + 5, vary(rng, pick(rng, ((70, 66, 74), (196, 190, 190), (158, 94, 84)))))


def _road(canvas: Canvas, rng, way: str) -> None:
    at = int(rng.integers(22, 43))
    shift = int(rng.integers(-3, 4))
    ends = {
        "horizontal": [(-2, at), (66, at + shift)],
        "vertical": [(at, -2), (at + shift, 66)],
        "diagonal": pick(rng, ([(-2, -2), (66, 66)], [(-2, 66), (66, -2)])),
    }[way]
    canvas.line(ends, (52, 50, 54), 7)
    canvas.line(ends, (232, 226, 200), 1.2)


def sample(rng: np.random.Generator, held_out: bool = False) -> Sample:
    """Draw one aerial picture; `held_out` takes photographs' other part for textures."""
    main, other = pick_some(rng, COVERS, 2)
    if rng.random() < 0.3:
        main, other = "city", pick(rng, COVERS[:4])
    odd = pick(rng, tuple(QUARTERS))
    road, tanks, roof = pick(rng, ROADS), int(rng.integers(0, 4)), pick(rng, ROOFS)
    canvas = Canvas((0, 0, 0))
    for name, (x, y) in QUARTERS.items():
        _cover(canvas, rng, other if name == odd else main, x, y, held_out)
    if road != "none":
        _road(canvas, rng, road)
    spots = pick_some(rng, [(x, y) for x in (10, 32, 54) for y in (10, 32, 54)], tanks + 1)
    for x, y in spots[1:]:
        canvas.ellipse(x + 1, y + 1, 6.6, 6.6, (30, 30, 32))
        canvas.ellipse(x, y, 6.2, 6.2, (244, 244, 240))
        canvas.ellipse(x, y, 2.0, 2.0, (170, 170, 172))
    x, y = spots[0]
    canvas.box(x - 8.5, y - 6.5, x + 8.5, y + 6.5, (24, 24, 26))
    canvas.box(x - 7.5, y - 5.5, x + 7.5, y + 5.5, vary(rng, COLORS[roof]))
    area = "urban" if main == "city" else "rural"
    qas = [
        ("main cover", "what is the main land cover ?", main),
        ("area", "is the area rural or urban ?", area),
        ("road", "which way does the road run ?", road),
        ("tanks", "how many tanks are there ?", str(tanks)),
        ("roof", "what color is the roof of the large building ?", roof),
        ("odd quarter", "which quarter has another land cover ?", odd),
    ]
    facts = [f"{main} everywhere", f"{other} {odd}", f"{area} area", f"{road} road", f"{tanks} tanks", f"{roof} roof"]
    return Sample(canvas.finish(rng, 9), qas, facts)
