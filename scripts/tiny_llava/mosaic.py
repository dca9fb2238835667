"""Pictures for the tower alone: a hand-written digit or a shape in each quarter, so that one picture teaches many."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mllm_keeplora.mini.draw import COLORS, QUARTERS, SHAPES, Canvas, digit_mask, pick, vary
from mllm_keeplora.mini.general_scenes import BACKGROUNDS, KINDS, new_cells, object_cells, visible_colors

DIGIT_SHARE, SHAPE_SHARE = 0.75, 0.15  # the rest of the quarters stays empty


def _digit(rng, canvas: Canvas, cells: np.ndarray, corner: tuple[int, int], room: int, hue: str) -> None:
    value, side = int(rng.integers(0, 10)), int(rng.integers(room * 3 // 4, room + 1))
    x, y = (c + int(rng.integers(0, room - side + 1)) for c in corner)
    mask = digit_mask(rng, value, side, held_out=False)
    canvas.paste(Image.new("RGB", mask.size, vary(rng, COLORS[hue])), x, y, mask)
    box = (x + side / 2, y + side / 2, side * 0.45, side * 0.5)
    object_cells(cells, box, KINDS.index(str(value)), hue, "big")


def _shape(rng, canvas: Canvas, cells: np.ndarray, corner: tuple[int, int], hue: str) -> None:
    kind, size = pick(rng, SHAPES), pick(rng, ("big", "small"))
    r = rng.uniform(11, 12.5) if size == "big" else rng.uniform(6.7, 7.7)
    x, y = (float(c + 16 + rng.integers(-3, 4)) for c in corner)
    canvas.shape(kind, x, y, r, vary(rng, COLORS[hue]))
    object_cells(cells, (x, y, r, r), KINDS.index(kind), hue, size)


def mosaic(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Draw one picture; every fourth holds a single large digit instead of four quarters.

    Returns:
        The 64 x 64 picture and its (channels, 8, 8) uint8 cell targets.
    """
    background = pick(rng, tuple(BACKGROUNDS))
    hues, canvas = visible_colors(background), Canvas(vary(rng, BACKGROUNDS[background], 6))
    if rng.random() < 0.25:
        cells = new_cells(background, 1)
        _digit(rng, canvas, cells, (int(rng.integers(0, 17)), int(rng.integers(0, 17))), 46, pick(rng, hues))
        return canvas.finish(rng), cells
    plan = [(corner, rng.random()) for corner in QUARTERS.values()]
    plan = [(corner, share) for corner, share in plan if share < DIGIT_SHARE + SHAPE_SHARE]
    cells = new_cells(background, len(plan))
    for corner, share in plan:
        if share < DIGIT_SHARE:
            _digit(rng, canvas, cells, corner, 31, pick(rng, hues))
        else:
            _shape(rng, canvas, cells, corner, pick(rng, hues))
    return canvas.finish(rng), cells
