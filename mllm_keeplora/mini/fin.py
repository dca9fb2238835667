"""Finance: bar, line and pie charts and candlesticks on white with axes."""

from __future__ import annotations

import numpy as np

from .draw import COLORS, Canvas, Sample, pick, pick_some, vary

CHART_COLORS = ("red", "green", "blue", "orange")
AXIS = (60, 60, 64)


def _axes(canvas: Canvas) -> None:
    for y in (14, 26, 38, 50):
        canvas.line([(7, y), (62, y)], (218, 218, 222), 1)
    canvas.line([(6, 3), (6, 59), (62, 59)], AXIS, 1.6)


def _bars(canvas: Canvas, rng):
    _axes(canvas)
    count = int(rng.integers(2, 5))
    colors = pick_some(rng, CHART_COLORS, count)
    heights = [12 + 40 * (i + rng.uniform(-0.1, 0.1)) / (count - 1) for i in range(count)]
    heights = [heights[i] for i in rng.permutation(count)]
    for i, (color, height) in enumerate(zip(colors, heights, strict=True)):
        x = 8 + i * 54 / count
        canvas.box(x + 3, 57 - height, x + 3 + min(12, 36 / count), 57, vary(rng, COLORS[color]))
    most, least = colors[int(np.argmax(heights))], colors[int(np.argmin(heights))]
    return [
        ("highest", "which company has the highest profit ?", most),
        ("lowest", "which company has the shortest bar ?", least),
        ("companies", "how many companies are shown ?", str(count)),
    ], [f"highest profit {most}", f"lowest profit {least}", f"{count} companies"]


def _line(canvas: Canvas, rng):
    _axes(canvas)
    way, color = pick(rng, ("up", "down", "flat")), pick(rng, CHART_COLORS)
    span = {"up": -1, "down": 1, "flat": 0}[way] * rng.uniform(28, 40)
    xs = np.linspace(8, 61, 8)
    ys = np.clip(31 + (0 if span else rng.uniform(-14, 14)) + np.linspace(-0.5, 0.5, 8) * span, 6, 56)
    canvas.line(list(zip(xs, ys + rng.uniform(-2.5, 2.5, 8), strict=True)), vary(rng, COLORS[color]), 2.6)
    return [
        ("trend", "in which direction does the price move ?", way),
        ("line color", "what color is the price line ?", color),
    ], [f"price moves {way}", f"{color} price line"]


def _pie(canvas: Canvas, rng):
    count = int(rng.integers(2, 5))
    colors, start = pick_some(rng, CHART_COLORS, count), float(rng.uniform(0, 360))
    shares = {2: (0.7, 0.3), 3: (0.55, 0.25, 0.2), 4: (0.49, 0.17, 0.17, 0.17)}[count]
    order = rng.permutation(count)
    for i in order:
        canvas.sector(32, 32, 27, start, start + 360 * shares[i], vary(rng, COLORS[colors[i]]), (255, 255, 255))
        start += 360 * shares[i]
    return [
        ("slice", "which share of the market is largest ?", colors[0]),
        ("slices", "how many shares does the market have ?", str(count)),
    ], [f"largest share {colors[0]}", f"{count} shares"]


def _candles(canvas: Canvas, rng):
    _axes(canvas)
    gain = bool(rng.random() < 0.5)
    main, other = ("green", "red") if gain else ("red", "green")
    minority = int(rng.integers(0, 6))
    for i in range(6):
        x, y, tall = 12 + i * 9, float(rng.uniform(22, 40)), float(rng.uniform(7, 13))
        color = COLORS[other if i == minority else main]
        canvas.line([(x, y - tall - 3), (x, y + tall + 3)], AXIS, 1)
        canvas.box(x - 3.4, y - tall, x + 3.4, y + tall, vary(rng, color))
    return [
        ("gain", "did most days end with a gain ?", "yes" if gain else "no"),
    ], [f"most days {main} so gain {'yes' if gain else 'no'}"]


CHARTS = {"bar": _bars, "line": _line, "pie": _pie, "candle": _candles}


def sample(rng: np.random.Generator, held_out: bool = False) -> Sample:
    """Draw one chart."""
    chart = pick(rng, tuple(CHARTS))
    canvas = Canvas((252, 252, 254))
    qas, facts = CHARTS[chart](canvas, rng)
    qas = [*qas, ("chart", "what kind of chart is it ?", chart)]
    return Sample(canvas.finish(rng, 4), qas, [*facts, f"{chart} chart"])
