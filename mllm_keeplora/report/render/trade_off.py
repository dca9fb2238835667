"""The trade-off curve: how well domains are learned against how much of the earlier ones is lost meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mllm_keeplora.report.render.figures import FAINT, INK, LINE_COLOURS, MARKERS, dress, new_figure, png_of

# Where a label may stand beside its point: offset in points, alignment; the first one that is free is taken.
PLACES = (
    (6, 6, "left", "bottom"), (-6, 6, "right", "bottom"), (6, -6, "left", "top"), (-6, -6, "right", "top"),
    (0, 12, "center", "bottom"), (0, -12, "center", "top"), (12, 0, "left", "center"), (-12, 0, "right", "center"),
    (10, 24, "left", "bottom"), (10, -24, "left", "top"), (-10, 24, "right", "bottom"), (-10, -24, "right", "top"),
)  # fmt: skip

DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
CROWDED = 4  # with more curves only ends and choices are labelled, and small losses get more room than large ones
FULL = 8  # with more, choices alone are labelled, by the curve's name, and the legend stands beside the picture


def trade_off_figure(
    curves: Mapping[str, Sequence[tuple[str, float, float]]],
    chosen: Collection[tuple[str, str]] = (),
    dark: bool = False,
) -> bytes:
    """Draw a line per strategy over its settings; up and right is better.

    Args:
        curves: name -> (setting, plasticity, BWT) in the order of the line.
        chosen: (name, setting) of points to mark with a ring.
        dark: draw light ink on a transparent ground.
    """
    crowded, full = len(curves) > CROWDED, len(curves) > FULL
    figure = new_figure(9.2 if full else 7.4, 5.2) if crowded else new_figure(6.2, 4.0)
    axes = figure.subplots()
    labels = []
    for i, (name, points) in enumerate(curves.items()):
        style = curve_style(i, dark)
        colour = style["color"]
        _, xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, markersize=5, linewidth=1.6, label=name, **style)
        for setting, x, y in points:
            if (name, setting) in chosen:
                axes.plot([x], [y], marker="o", markersize=13, markerfacecolor="none", color=colour, linestyle="none")
            is_end = setting in (points[0][0], points[-1][0])
            if not crowded or (name, setting) in chosen or (is_end and not full):
                labels.append((name if full else setting, x, y, colour))
    axes.margins(0.14)
    if crowded:
        axes.set_yscale("symlog", linthresh=5, linscale=1.5)
        axes.set_yticks([-50, -20, -10, -5, 0, *([5] if axes.get_ylim()[1] > 5 else [])], minor=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    x, y = "plasticity: score right after learning (%)", "BWT: change since then (points)"
    dress(axes, dark, x, y, grid="both")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if full else {"loc": "lower left"}
    legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK[dark], **place)
    _place(axes, labels, [legend])
    axes.axhline(0, color=FAINT[dark], linewidth=0.8, zorder=1)
    return png_of(figure, dark)


def curve_style(i: int, dark: bool = False) -> dict[str, Any]:
    """Choose colour, marker and line of the i-th curve; when colours come round again, the other two move on."""
    turn = i // len(MARKERS)
    return {
        "color": LINE_COLOURS[dark][i % len(LINE_COLOURS[dark])],
        "marker": MARKERS[(i + turn) % len(MARKERS)],
        "linestyle": DASHES[turn % len(DASHES)],
    }


def _place(axes: Any, labels: Sequence[tuple[str, float, float, str]], taken: Sequence[Any]) -> None:
    """Write each label beside its point, where it covers least of the lines and labels that are there already."""
    import numpy as np

    axes.figure.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in taken]
    dots: list[Any] = []  # of every line its points and some between them, in pixels
    for line in axes.lines:
        points = axes.transData.transform(line.get_xydata())
        dots += [*np.linspace(points[:-1], points[1:], 25).reshape(-1, 2), *points]
    for text, x, y, colour in labels:
        tried = []
        for place, (dx, dy, horizontal, vertical) in enumerate(PLACES):
            label = axes.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=horizontal, va=vertical,
                color=colour, fontsize=8, parse_math=False,
            )  # fmt: skip
            box = label.get_window_extent()
            covered = sum(box.overlaps(other) for other in boxes) * 100 + box.count_contains(dots)
            outside = not axes.bbox.containsx(box.x0) or not axes.bbox.containsx(box.x1)
            tried.append((covered + 1000 * outside, place, label, box))
        tried.sort(key=lambda each: each[:2])
        for *_, label, _ in tried[1:]:
            label.remove()
        boxes.append(tried[0][3])
