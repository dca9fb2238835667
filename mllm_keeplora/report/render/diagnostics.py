"""What the diagnostics of a run say: frames of numbers, terminal tables and pictures of them for its page.

Reads what each unit wrote (`gradient.json`, `diagnostics.json`); opens no run and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, FiniteFloat
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.report.render import figures
from mllm_keeplora.report.render.figures import FAINT, INK, LINE_COLOURS, MARKERS
from mllm_keeplora.report.render.html import Drawn, in_both
from mllm_keeplora.report.render.view import NOT_MEASURED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

BLOCK = r".*\.layers?\.(\d+)\."  # of a target layer's name; a projector's has none
SHARES = {  # as they are stored, and as they are shown
    "protected": "protected",
    "captured": "captured",
    "discarded": "discarded",
    "captured_of_residual": "captured of the rest",
}
LEAKS = {"leak": "leak", "leak_evaluated": "evaluated", "leak_bfloat16": "as bfloat16"}
MEANING = {
    "Capacity": "Share of input directions that are kept, median over blocks; free: the fewest left in a layer; "
    "domains left: until the fullest layer is full, at the mean growth so far and with nothing given up.",
    "Gradient": "Energy of a domain's mean gradient: inside what is kept, inside the adapter's A, and the rest.",
    "Updates": "Update: median of ||dW|| / ||W||. Leak: the largest ||dW Q|| / ||dW|| of a layer; of the factors, of "
    "the weights that are evaluated, and as a merge cast to bfloat16 would have it.",
    "Update by depth": "Mean ||dW|| / ||W|| over the layers of a block.",
    "Interference": "How strongly a domain's update answers to the inputs of a set, in percent of the layer's output.",
    "Overlap": "Share of a set's input energy inside the directions kept at the start and by each domain, in percent.",
}


class Gradient(TypedDict, total=False):
    """What is read of a gradient.json."""

    gradient: dict[str, dict[str, FiniteFloat]]


class Room(TypedDict):
    """What the last diagnostics say of a layer's directions."""

    d_in: int
    parts: Annotated[list[int], Field(min_length=1)]
    free: int


class Change(TypedDict):
    """What diagnostics say of a layer's update."""

    __pydantic_config__ = ConfigDict(extra="allow")

    update: FiniteFloat


class Inputs(TypedDict):
    """What diagnostics say of the inputs of a set in a layer."""

    interference: FiniteFloat
    covered: list[FiniteFloat]


class Diagnostics(TypedDict, total=False):
    """What is read of a diagnostics.json: layer -> facts, or set -> layer -> facts."""

    capacity: dict[str, Room]
    changes: dict[str, Change]
    inputs: dict[str, dict[str, Inputs]]


class UnitFacts(NamedTuple):
    """Name a unit of a run and hold the content of its gradient.json and diagnostics.json (empty if absent)."""

    name: str
    gradient: Mapping[str, Any]
    diagnostics: Mapping[str, Any]


def capacity(units: Sequence[UnitFacts]) -> DataFrame:
    """Measure the room in the layers of each kind (q_proj, ..., projector) at the last unit that was diagnosed.

    Returns:
        A row a kind, none where nothing is kept. Columns: input size, or the range of sizes; at the start and after
        each unit the median share of directions kept, in percent; the fewest free directions of a layer; and units
        until the fullest layer has none, at the mean growth so far, NaN where none grows.
    """
    import pandas as pd

    layers = _frame(_last(units).get("capacity", {}))
    if layers.empty:
        return layers
    kinds = [_kind(layer) for layer in layers.index]
    parts = _frame(dict(layers["parts"]))
    growth = parts.iloc[:, 1:].mean(axis=1)
    layers["domains left"] = layers["free"] / growth.where(growth > 0)
    shares = 100 * parts.cumsum(axis=1).div(layers["d_in"], axis=0)
    shares.columns = _stages(units, shares)
    by_kind = layers.groupby(kinds, sort=False)
    sizes = by_kind["d_in"].agg(["min", "max"]).astype(str)
    sizes = sizes["min"].where(sizes["min"] == sizes["max"], sizes["min"] + "-" + sizes["max"]).rename("d_in")
    kept = shares.groupby(kinds, sort=False).median()
    return pd.concat([sizes, kept, by_kind[["free", "domains left"]].min()], axis=1)


def _kind(layer: str) -> str:
    """Name a layer's kind, as q_proj, with its tower where a base has several that learn."""
    return f"{_tower(layer)} {layer.rsplit('.', 1)[-1]}".strip() if re.search(BLOCK, layer) else "projector"


def _tower(layer: str) -> str:
    """Name the tower of a dual encoder's layer; empty for other bases."""
    return next((tower for tower in ("vision", "text") if layer.startswith(f"{tower}_model.")), "")


def gradient_split(units: Sequence[UnitFacts]) -> DataFrame:
    """Average the shares of gradient energy (columns) over layers, in percent, a row a unit that measured them."""
    layers = {unit.name: _frame(unit.gradient.get("gradient", {})) for unit in units}
    means = {name: 100 * each.reindex(columns=list(SHARES)).mean() for name, each in layers.items()}
    return _frame(means).dropna().rename(columns=SHARES)


def changes(units: Sequence[UnitFacts]) -> DataFrame:
    """Give a unit's median update in percent and its largest leak of each form, NaN where nothing is kept."""
    found = {}
    for name, layers in _changed(units).items():
        leaks = layers.reindex(columns=list(LEAKS)).max().rename(LEAKS)
        found[name] = {"update": 100 * layers["update"].median(), **leaks}
    return _frame(found)


def update_by_depth(units: Sequence[UnitFacts]) -> DataFrame:
    """Average ||dW|| / ||W|| over the layers of a block (column), in percent, of each tower that learns."""
    found = {}
    for name, layers in _changed(units).items():
        depth, towers = layers.index.str.extract(BLOCK, expand=False).astype(float), layers.index.map(_tower)
        for tower in towers.unique():
            own = layers["update"].where(towers == tower)
            found[f"{name} {tower}".strip()] = 100 * own.groupby(depth).mean()
    return _frame(found).dropna(how="all")


def interference(units: Sequence[UnitFacts]) -> DataFrame:
    """Average how strongly a unit's update (row) answers a set's inputs (column), in percent of the layer's output."""
    strengths = {}
    for unit in units:
        if unit.diagnostics.get("inputs"):
            sets = {asked: _frame(layers) for asked, layers in unit.diagnostics["inputs"].items()}
            strengths[unit.name] = {asked: 100 * layers["interference"].mean() for asked, layers in sets.items()}
    return _frame(strengths)


def overlap(units: Sequence[UnitFacts]) -> DataFrame:
    """Average the share of a set's input energy (row) inside what was kept by whom (column), in percent."""
    inputs = _last(units).get("inputs", {})
    shares = _frame({asked: 100 * _frame(dict(_frame(inputs[asked])["covered"])).mean() for asked in inputs})
    shares.columns = _stages(units, shares)
    return shares


@contextmanager
def _fitting() -> Iterator[None]:
    """Tell in a sentence that numbers of several units do not go together."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError) as error:
        told = f"{type(error).__name__}: {shortened(first_line(error))}"
        raise UserError(f"a diagnostics.json or gradient.json of the run is damaged: {told}") from None


@_fitting()
def inspection(units: Sequence[UnitFacts]) -> RenderableType:
    """Show what was diagnosed as terminal tables; those without numbers are left out."""
    room = capacity(units)
    tables = (
        ("Capacity", "layers", room, ["{}", *["{:.0f} %"] * (room.shape[1] - 3), "{}", "{:.1f}"]),
        ("Gradient", "domain", gradient_split(units), ["{:.1f} %"] * len(SHARES)),
        ("Updates", "domain", changes(units), ["{:.1f} %", *["{:.1e}"] * len(LEAKS)]),
        ("Interference", "update of", interference(units), None),
        ("Overlap", "inputs of", overlap(units), None),
    )
    parts: list[RenderableType] = []
    for title, corner, frame, forms in tables:
        if not frame.empty:
            table = _table(corner, frame, forms or ["{:.1f}"] * frame.shape[1])
            parts += [Text(title, style="bold"), table, Text(MEANING[title], style="dim"), Text("")]
    return Group(*parts)


@_fitting()
def inspection_figures(units: Sequence[UnitFacts]) -> list[tuple[str, Drawn, str]]:
    """Draw what was diagnosed: heading, picture and meaning of each; none if nothing was."""
    room, split, updates = capacity(units), gradient_split(units), update_by_depth(units)
    strengths, shares = interference(units), overlap(units)
    drawn = (
        ("Capacity", room, lambda dark: capacity_figure(room.iloc[:, 1:-2], dark)),
        ("Gradient", split, lambda dark: split_figure(split, dark)),
        ("Interference", strengths, lambda dark: matrix_figure(strengths, "update of", "inputs of", dark)),
        ("Overlap", shares, lambda dark: matrix_figure(shares, "inputs of", "kept by", dark)),
        ("Update by depth", updates, lambda dark: update_figure(updates, dark)),
    )
    return [(title, in_both(draw), MEANING[title]) for title, frame, draw in drawn if not frame.empty]


def _last(units: Sequence[UnitFacts]) -> Mapping[str, Any]:
    return next((unit.diagnostics for unit in reversed(units) if unit.diagnostics), {})


def _frame(rows: Mapping[str, Any]) -> DataFrame:
    import pandas as pd

    return pd.DataFrame.from_dict(rows, orient="index")


def _changed(units: Sequence[UnitFacts]) -> dict[str, DataFrame]:
    found = {unit.name: _frame(unit.diagnostics.get("changes", {})) for unit in units}
    return {name: layers for name, layers in found.items() if not layers.empty}


def _stages(units: Sequence[UnitFacts], frame: DataFrame) -> list[str]:
    """Who kept what the columns of a frame count: what was there at the start, then the units."""
    return ["start", *(unit.name for unit in units)][: frame.shape[1]]


def _table(corner: str, frame: DataFrame, forms: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(corner)
    for name in frame.columns:
        table.add_column(name, justify="right")
    for name, *row in frame.itertuples():
        cells = (NOT_MEASURED if cell != cell else form.format(cell) for form, cell in zip(forms, row, strict=True))
        table.add_row(name, *cells)
    return table


def capacity_figure(kept: DataFrame, dark: bool = False) -> bytes:
    """Draw the share of directions that are kept, a line per kind of layer (row) over the stages (columns)."""
    figure, axes = _lines(kept, range(kept.shape[1]), dark)
    axes.axhline(100, color=FAINT[dark], linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 104)
    axes.set_xticks(range(kept.shape[1]), kept.columns, parse_math=False)
    return _finished(figure, dark, "directions kept (%)", columns=2)


def split_figure(split: DataFrame, dark: bool = False) -> bytes:
    """Draw where the energy of each domain's gradient goes, a stacked bar per domain (row)."""
    figure = figures.new_figure(5.6, 3.3)
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
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, dark, "update / weight (%)", columns=2, x="block")


def matrix_figure(matrix: DataFrame, rows: str, columns: str, dark: bool = False) -> bytes:
    """Draw a matrix as a heat map from zero to its largest value; `rows` and `columns` say what they are."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0.0, matrix.max().max() or 1.0), cmap="YlGnBu")
    num_rows, num_columns = matrix.shape
    figure = figures.new_figure(1.8 + 0.66 * num_columns, 1.2 + 0.42 * num_rows)
    axes = figure.subplots()
    for i, row in enumerate(matrix.itertuples(index=False)):
        for j, value in enumerate(row):
            if value == value:
                figures.draw_cell(axes, (j, i), value, colours, dark, size=8.5)
    axes.set_xlim(0, num_columns)
    axes.set_ylim(num_rows, 0)
    axes.set_xticks([j + 0.5 for j in range(num_columns)], matrix.columns, parse_math=False)
    axes.set_yticks([i + 0.5 for i in range(num_rows)], matrix.index, parse_math=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    figures.dress(axes, dark, columns, rows, size=9)
    return figures.png_of(figure, dark)


def _lines(frame: DataFrame, places: object, dark: bool) -> tuple[Figure, Axes]:
    """A line for each row over the places of its columns."""
    figure = figures.new_figure(5.6, 3.3)
    axes = figure.subplots()
    colours = LINE_COLOURS[dark]
    for i, (name, *values) in enumerate(frame.itertuples()):
        style = {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(places, values, linewidth=1.6, label=name, **style)
    return figure, axes


def _finished(figure: Figure, dark: bool, y: str, columns: int, x: str = "") -> bytes:
    """Add what these pictures share: labels of the axes, a grid, a legend in so many columns."""
    (axes,) = figure.axes
    figures.dress(axes, dark, x, y, grid="y")
    axes.set_axisbelow(True)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": columns}
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK[dark], **place)
    return figures.png_of(figure, dark)
