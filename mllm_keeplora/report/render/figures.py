"""Figures of a score matrix as PNG bytes. matplotlib is imported where it is drawn with, and keeps no global state."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mllm_keeplora.report.render.view import ZERO_SHOT, Results, Sheet, score_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito: told apart with every common form of colour blindness; lighter on a dark page.
LINE_COLOURS = {
    False: ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C98500", "#56B4E9", "#6A51A3", "#7A7A1F"),
    True: ("#56B4E9", "#FF8B3D", "#2CC295", "#E39CC4", "#F0B429", "#8FB8FF", "#B39DDB", "#C5C56B"),
}
MARKERS = "osD^vPX*"
INK = {False: "#1f2328", True: "#e6e8eb"}
FAINT = {False: "#8c959f", True: "#7d8590"}
REFERENCE_GAP = 0.25
ACROSS = 4  # heat maps side by side; more of them go below
MANY = 20  # columns or rows from which on cells shrink, lose their numbers, and only some are named
DPI = 160


def score_matrix_figure(results_list: Sequence[Results], titles: Sequence[str], dark: bool = False) -> bytes:
    """Draw score matrices as heat maps side by side, in rows of four, on one colour scale.

    The reference rows lie on top, a frame marks the domain just learned, hatching a cell that was not measured.

    Args:
        results_list: results of at least one run.
        titles: one per run.
        dark: draw light ink on a transparent ground, for a dark page.
    """
    sheets = [score_sheet(results) for results in results_list]
    num_rows = max(len(sheet.references) + len(sheet.stages) for sheet in sheets)
    shrunk = min(1.0, MANY / max(num_rows, *(len(sheet.columns) for sheet in sheets)))
    width, height = 0.55 * shrunk, 0.38 * shrunk
    across = min(len(sheets), ACROSS)
    ratios = [max(len(sheet.columns) for sheet in sheets[place::across]) for place in range(across)]
    down = -(-len(sheets) // across)
    figure = new_figure(0.8 + sum(width * ratio + 0.9 for ratio in ratios), down * (height * num_rows + 0.8))
    grid = figure.subplots(down, across, squeeze=False, gridspec_kw={"width_ratios": ratios}).flatten()
    colours = _colour_scale(sheets)
    for axes, sheet, title in zip(grid, sheets, titles, strict=False):
        _draw_sheet(axes, sheet, title, colours, dark, numbers=shrunk == 1.0)
    for axes in grid[len(sheets) :]:
        axes.set_axis_off()
    bar = figure.colorbar(colours, ax=list(grid), fraction=0.03, pad=0.015, aspect=18)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK[dark], labelsize=8, length=0)
    bar.set_label("score (%)", color=INK[dark], fontsize=8.5)
    return png_of(figure, dark)


def domain_curves_figure(results: Results, dark: bool = False) -> bytes:
    """Draw the score of every domain over the sequence.

    Dashed before the domain is learned, a large marker at the moment it is, solid after; general suites in grey.

    Args:
        results: the content of results.json.
        dark: draw light ink on a transparent ground, for a dark page.
    """
    sheet = score_sheet(results)
    rows = [*(row for row in sheet.references if row.label == ZERO_SHOT), *sheet.stages]
    first_stage = len(rows) - len(sheet.stages)
    named, steps = _some(len(sheet.domains)), _some(len(rows))
    figure = new_figure(min(max(4.4, 0.62 * len(rows) + 1.3), 14.0), 3.3 if len(sheet.columns) <= MANY else 4.5)
    axes = figure.subplots()
    ends = []
    for j, name in enumerate(sheet.columns):
        series = [float("nan") if row.scores[j] is None else row.scores[j] for row in rows]
        is_domain, places = j < len(sheet.domains), range(len(rows))
        colour = LINE_COLOURS[dark][j % len(LINE_COLOURS[dark])] if is_domain else FAINT[dark]
        if is_domain:
            style, at = {"color": colour, "marker": MARKERS[j % len(MARKERS)]}, first_stage + j
            dashes = {"linewidth": 1.1, "linestyle": (0, (4, 2.5)), "alpha": 0.6}
            axes.plot(places[: at + 1], series[: at + 1], markersize=3.5, **dashes, **style)
            axes.plot(places[at:], series[at:], markersize=3.5, linewidth=2.0, **style)
            axes.plot([at], [series[at]], markersize=8.5, linestyle="none", **style)
        else:
            axes.plot(places, series, color=colour, linewidth=1.4, linestyle=(0, (1, 1.5)))
        measured = [value for value in series if value == value]
        ends += [(measured[-1], name, colour)] if measured and (j in named or not is_domain) else []
    _label_ends(axes, ends, len(rows) - 1)
    axes.set_xticks(steps, [rows[step].label.replace("after ", "after\n") for step in steps], parse_math=False)
    axes.set_xlim(-0.25, len(rows) - 0.75)
    axes.set_ylim(0, max(100.0, *(end[0] for end in ends)) if ends else 100.0)
    dress(axes, dark, y="score (%)", grid="y")
    axes.spines["bottom"].set(visible=True, color=FAINT[dark])
    return png_of(figure, dark)


def data_uri(png: bytes) -> str:
    """Write a picture as a data URI, for a page that must stand alone."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _draw_sheet(axes: "Axes", sheet: Sheet, title: str, colours: Any, dark: bool, numbers: bool = True) -> None:
    rows = [*sheet.references, *sheet.stages]
    tops = [i + (REFERENCE_GAP if i >= len(sheet.references) > 0 else 0.0) for i in range(len(rows))]
    lefts = [j + (REFERENCE_GAP if j >= len(sheet.domains) else 0.0) for j in range(len(sheet.columns))]
    for row, top in zip(rows, tops, strict=True):
        for j, (score, left) in enumerate(zip(row.scores, lefts, strict=True)):
            is_learned = row.phase(j, len(sheet.domains)) == "learned"
            draw_cell(axes, (left, top), score, colours, dark, is_learned, 9 if numbers else 0)
    axes.set_xlim(0, lefts[-1] + 1)
    axes.set_ylim(tops[-1] + 1, 0)
    columns, named = _some(len(lefts)), _some(len(tops))
    names = [sheet.columns[j] for j in columns]
    turned = 30 if max(map(len, sheet.columns)) > 8 else 0
    axes.set_xticks([lefts[j] + 0.5 for j in columns], names, rotation=turned, parse_math=False)
    axes.set_yticks([tops[i] + 0.5 for i in named], [rows[i].label for i in named], parse_math=False)
    axes.xaxis.tick_top()
    dress(axes, dark, size=9)
    axes.set_title(title, color=INK[dark], fontsize=10.5, fontweight="bold", pad=10, parse_math=False)


def draw_cell(
    axes: "Axes", corner: tuple[float, float], score: float | None, colours: Any, dark: bool, framed=False, size=9.0
) -> None:
    """Draw a cell of a heat map: hatched where there is no score, with the score in digits of a size that may be 0."""
    from matplotlib.patches import Rectangle

    left, top = corner
    if score is None:
        style = {"facecolor": "none", "edgecolor": FAINT[dark], "hatch": "////", "linewidth": 0.0, "alpha": 0.45}
        axes.add_patch(Rectangle((left + 0.03, top + 0.03), 0.94, 0.94, **style))
        return
    fill = colours.to_rgba(score)
    frame = {"edgecolor": INK[dark], "linewidth": 1.6} if framed else {"linewidth": 0}
    axes.add_patch(Rectangle((left + 0.03, top + 0.03), 0.94, 0.94, facecolor=fill, **frame))
    if size:
        brightness = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
        ink = "#ffffff" if brightness < 0.5 else "#11161c"
        axes.text(left + 0.5, top + 0.52, f"{score:.1f}", ha="center", va="center", color=ink, fontsize=size)


def dress(axes: "Axes", dark: bool, x: str = "", y: str = "", grid: str = "", size: float = 8.5) -> None:
    """Give axes the look that pictures share: ink, no frame, a grid along an axis if one is named, labels."""
    axes.tick_params(colors=INK[dark], labelsize=size, length=0)
    axes.spines[:].set_visible(False)
    if grid:
        axes.grid(axis=grid, color=FAINT[dark], alpha=0.25, linewidth=0.6)
    axes.set_xlabel(x, color=INK[dark], fontsize=9)
    axes.set_ylabel(y, color=INK[dark], fontsize=9)


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]], position: int) -> None:
    """Write each line's name at its right end, moved apart where two would touch."""
    ends = sorted(ends)
    heights = _spread([value for value, _, _ in ends], distance=5.5)
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        style = {"color": colour, "va": "center", "fontsize": 9, "annotation_clip": False, "parse_math": False}
        axes.annotate(name, (position, height), xytext=(8, 0), textcoords="offset points", **style)


def _spread(values: Sequence[float], distance: float) -> list[float]:
    """Move ascending values apart to at least `distance`, each crowd staying centred on its mean."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    steps = distance * np.arange(len(values))
    return (isotonic_regression(np.array(values) - steps).x + steps).tolist() if values else []


def _colour_scale(sheets: Sequence[Sheet]) -> Any:
    """Return the mapping from score to colour: 0 to 100, further up if a score (captions) exceeds 100."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scores = [score for sheet in sheets for row in sheet.measured for score in row.scores if score is not None]
    return ScalarMappable(Normalize(min(0.0, *scores, 0.0), max(100.0, *scores, 100.0)), cmap="YlGnBu")


def _some(count: int) -> list[int]:
    """Places to name: all of a few, evenly spaced ones of many, the first and the last always."""
    if count <= MANY:
        return list(range(count))
    return sorted({round(k * (count - 1) / (MANY // 2)) for k in range(MANY // 2 + 1)})


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def png_of(figure: "Figure", dark: bool) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=dark, metadata={"Software": None})
    return buffer.getvalue()
