"""Pictures of a run's diagnostics as PNG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_keeplora.report.render.figures import FAINT, INK, LINE_COLOURS, MARKERS, draw_cell, new_figure, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


def capacity_figure(kept: DataFrame, dark: bool = False) -> bytes:
    """Draw the share of directions that are kept, a line per kind of layer (row) over the stages (columns)."""
    figure, axes = _lines(kept, range(kept.shape[1]), dark)
    axes.axhline(100, color=FAINT[dark], linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 104)
    axes.set_xticks(range(kept.shape[1]), kept.columns, parse_math=False)
    return _finished(figure, dark, "directions kept (%)", columns=2)


def split_figure(split: DataFrame, dark: bool = False) -> bytes:
    """Draw where the energy of each domain's gradient goes, a stacked bar per domain (row)."""
    figure = new_figure(5.6, 3.3)
    axes = figure.subplots()
    bottom = 0.0 * split["protected"]
    shades = {"protected": LINE_COLOURS[dark][0], "captured": LINE_COLOURS[dark][2], "discarded": FAINT[dark]}
    for key, colour in shades.items():
        axes.bar(range(len(split)), split[key], bottom=bottom, width=0.62, color=colour, label=key)
        bottom = bottom + split[key]
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(split)), split.index, parse_math=False)
    return _finished(figure, dark, "gradient energy (%)", columns=3)


def update_figure(updates: DataFrame, dark: bool = False) -> bytes:
    """Draw the size of each domain's update (row) relative to the weights, by depth (columns)."""
    figure, axes = _lines(updates, updates.columns, dark)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block", color=INK[dark], fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, dark, "update / weight (%)", columns=2)


def matrix_figure(matrix: DataFrame, rows: str, columns: str, dark: bool = False) -> bytes:
    """Draw a matrix as a heat map from zero to its largest value; `rows` and `columns` say what they are."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0.0, matrix.max().max() or 1.0), cmap="YlGnBu")
    num_rows, num_columns = matrix.shape
    figure = new_figure(1.8 + 0.66 * num_columns, 1.2 + 0.42 * num_rows)
    axes = figure.subplots()
    for i, row in enumerate(matrix.itertuples(index=False)):
        for j, value in enumerate(row):
            if value == value:
                draw_cell(axes, (j, i), value, colours, dark, size=8.5)
    axes.set_xlim(0, num_columns)
    axes.set_ylim(num_rows, 0)
    axes.set_xticks([j + 0.5 for j in range(num_columns)], matrix.columns, parse_math=False)
    axes.set_yticks([i + 0.5 for i in range(num_rows)], matrix.index, parse_math=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(columns, color=INK[dark], fontsize=9)
    axes.set_ylabel(rows, color=INK[dark], fontsize=9)
    axes.tick_params(length=0, colors=INK[dark], labelsize=9)
    axes.spines[:].set_visible(False)
    return png_of(figure, dark)


def _lines(frame: DataFrame, places: object, dark: bool) -> tuple[Figure, Axes]:
    """A line for each row over the places of its columns."""
    figure = new_figure(5.6, 3.3)
    axes = figure.subplots()
    colours = LINE_COLOURS[dark]
    for i, (name, *values) in enumerate(frame.itertuples()):
        style = {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(places, values, linewidth=1.6, label=name, **style)
    return figure, axes


def _finished(figure: Figure, dark: bool, label: str, columns: int) -> bytes:
    """Add what these pictures share: a label of the y axis, a grid, a legend in so many columns."""
    (axes,) = figure.axes
    axes.set_ylabel(label, color=INK[dark], fontsize=9)
    axes.tick_params(colors=INK[dark], labelsize=8.5, length=0)
    axes.grid(axis="y", color=FAINT[dark], alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": columns}
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK[dark], **place)
    return png_of(figure, dark)
