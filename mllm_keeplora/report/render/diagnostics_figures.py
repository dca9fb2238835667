"""Pictures of a run's diagnostics as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mllm_keeplora.report.render.diagnostics import CapacityRow, Matrix
from mllm_keeplora.report.render.figures import FAINT, INK, LINE_COLOURS, MARKERS, new_figure, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def capacity_figure(rows: Sequence[CapacityRow], stages: Sequence[str], dark: bool = False) -> bytes:
    """Draw the share of directions that are kept, a line per kind of layer over the stages."""
    figure = new_figure(5.6, 3.3)
    axes = figure.subplots()
    colours = LINE_COLOURS[dark]
    for i, row in enumerate(rows):
        shares = [100 * share for share in row.shares]
        style = {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(range(len(shares)), shares, linewidth=1.6, label=row.kind, **style)
    axes.axhline(100, color=FAINT[dark], linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 104)
    _dress(axes, dark, "directions kept (%)")
    axes.set_xticks(range(len(stages)), stages, parse_math=False)
    _legend(axes, dark, columns=2)
    return png_of(figure, dark)


def split_figure(split: Mapping[str, Mapping[str, float]], dark: bool = False) -> bytes:
    """Draw where the energy of each domain's gradient goes, a stacked bar per domain."""
    figure = new_figure(5.6, 3.3)
    axes = figure.subplots()
    names, bottom = list(split), [0.0] * len(split)
    shades = {"protected": LINE_COLOURS[dark][0], "captured": LINE_COLOURS[dark][2], "discarded": FAINT[dark]}
    for key, colour in shades.items():
        values = [100 * split[name][key] for name in names]
        axes.bar(range(len(names)), values, bottom=bottom, width=0.62, color=colour, label=key)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    _dress(axes, dark, "gradient energy (%)")
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(names)), names, parse_math=False)
    _legend(axes, dark, columns=3)
    return png_of(figure, dark)


def update_figure(updates: Mapping[str, Mapping[int, float]], dark: bool = False) -> bytes:
    """Draw the size of each domain's update relative to the weights, by depth."""
    figure = new_figure(5.6, 3.3)
    axes = figure.subplots()
    colours = LINE_COLOURS[dark]
    for i, (name, by_depth) in enumerate(updates.items()):
        style = {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(list(by_depth), [100 * value for value in by_depth.values()], linewidth=1.6, label=name, **style)
    _dress(axes, dark, "update / weight (%)")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block", color=INK[dark], fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes, dark, columns=2)
    return png_of(figure, dark)


def matrix_figure(matrix: Matrix, rows: str, columns: str, dark: bool = False) -> bytes:
    """Draw a matrix as a heat map from zero to its largest value; `rows` and `columns` say what they are."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    measured = [value for row in matrix.values for value in row if value is not None]
    colours = ScalarMappable(Normalize(0.0, max(measured, default=1.0) or 1.0), cmap="YlGnBu")
    figure = new_figure(1.8 + 0.66 * len(matrix.columns), 1.2 + 0.42 * len(matrix.rows))
    axes = figure.subplots()
    for i, row in enumerate(matrix.values):
        for j, value in enumerate(row):
            _cell(axes, (j, i), value, colours)
    axes.set_xlim(0, len(matrix.columns))
    axes.set_ylim(len(matrix.rows), 0)
    axes.set_xticks([j + 0.5 for j in range(len(matrix.columns))], matrix.columns, parse_math=False)
    axes.set_yticks([i + 0.5 for i in range(len(matrix.rows))], matrix.rows, parse_math=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(columns, color=INK[dark], fontsize=9)
    axes.set_ylabel(rows, color=INK[dark], fontsize=9)
    axes.tick_params(length=0, colors=INK[dark], labelsize=9)
    axes.spines[:].set_visible(False)
    return png_of(figure, dark)


def _cell(axes: Axes, corner: tuple[float, float], value: float | None, colours) -> None:
    from matplotlib.patches import Rectangle

    if value is None:
        return
    left, top = corner
    fill = colours.to_rgba(value)
    axes.add_patch(Rectangle((left + 0.03, top + 0.03), 0.94, 0.94, facecolor=fill, linewidth=0))
    brightness = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    ink = "#ffffff" if brightness < 0.5 else "#11161c"
    axes.text(left + 0.5, top + 0.52, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=8.5)


def _dress(axes: Axes, dark: bool, label: str) -> None:
    axes.set_ylabel(label, color=INK[dark], fontsize=9)
    axes.tick_params(colors=INK[dark], labelsize=8.5, length=0)
    axes.grid(axis="y", color=FAINT[dark], alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, dark: bool, columns: int) -> None:
    legend = axes.legend(frameon=False, fontsize=8.5, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    for text in legend.get_texts():
        text.set_color(INK[dark])
