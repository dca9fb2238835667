"""What the diagnostics of a run say: frames of numbers, terminal tables and pictures of them for its page.

Reads what each unit wrote (`gradient.json`, `diagnostics.json`); opens no run and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mllm_keeplora.report.render.diagnostics_figures import (
    capacity_figure,
    matrix_figure,
    split_figure,
    update_figure,
)
from mllm_keeplora.report.render.html import Drawn, in_both
from mllm_keeplora.report.render.view import NOT_MEASURED

if TYPE_CHECKING:
    from pandas import DataFrame

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


class UnitFacts(NamedTuple):
    """One unit of a run: its name, the content of its gradient.json and of its diagnostics.json (empty if absent)."""

    name: str
    gradient: Mapping[str, Any]
    diagnostics: Mapping[str, Any]


def capacity(units: Sequence[UnitFacts]) -> DataFrame:
    """Tell the room in the layers of each kind (q_proj, ..., projector) at the last unit that was diagnosed.

    Returns:
        A row a kind, none where nothing is kept. Columns: input size, or the range of sizes; at the start and after
        each unit the median share of directions kept, in percent; the fewest free directions of a layer; and units
        until the fullest layer has none, at the mean growth so far, NaN where none grows.
    """
    import pandas as pd

    layers = _by_layer(_last(units), "capacity")
    if layers.empty:
        return layers
    kinds = ["projector" if ".layers." not in layer else layer.rsplit(".", 1)[-1] for layer in layers.index]
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


def gradient_split(units: Sequence[UnitFacts]) -> DataFrame:
    """Average the shares of gradient energy (columns) over layers, in percent, a row a unit that measured them."""
    layers = {unit.name: _by_layer(unit.gradient, "gradient") for unit in units}
    means = {name: 100 * each.reindex(columns=list(SHARES)).mean() for name, each in layers.items()}
    return _frame(means).dropna().rename(columns=SHARES)


def changes(units: Sequence[UnitFacts]) -> DataFrame:
    """Tell the median update in percent and the largest leak of a layer in each form, NaN where nothing is kept."""
    found = {}
    for name, layers in _changed(units).items():
        leaks = layers.reindex(columns=list(LEAKS)).max().rename(LEAKS)
        found[name] = {"update": 100 * layers["update"].median(), **leaks}
    return _frame(found)


def update_by_depth(units: Sequence[UnitFacts]) -> DataFrame:
    """Average ||dW|| / ||W|| over the layers of a block (column), in percent; the projector has no depth."""
    found = {}
    for name, layers in _changed(units).items():
        depth = layers.index.str.extract(r".*\.layers\.(\d+)", expand=False).astype(float)
        found[name] = 100 * layers["update"].groupby(depth).mean()
    return _frame(found).dropna(how="all")


def interference(units: Sequence[UnitFacts]) -> DataFrame:
    """Tell how strongly a unit's update (row) answers to a set's inputs (column), in percent of the layer's output."""
    inputs = {unit.name: unit.diagnostics["inputs"] for unit in units if unit.diagnostics.get("inputs")}
    return _frame(
        {
            name: {asked: 100 * _by_layer(sets, asked)["interference"].mean() for asked in sets}
            for name, sets in inputs.items()
        }
    )


def overlap(units: Sequence[UnitFacts]) -> DataFrame:
    """Tell the share of a set's input energy (row) inside what was kept by whom (column), in percent, at the end."""
    inputs = _last(units).get("inputs", {})
    covered = {asked: _by_layer(inputs, asked)["covered"] for asked in inputs}
    shares = _frame({asked: 100 * _frame(dict(each)).mean() for asked, each in covered.items()})
    shares.columns = _stages(units, shares)
    return shares


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


def _by_layer(facts: Mapping[str, Any], key: str) -> DataFrame:
    """A row a layer; none where the facts lack the key."""
    return _frame(facts.get(key, {}))


def _frame(rows: Mapping[str, Any]) -> DataFrame:
    import pandas as pd

    return pd.DataFrame.from_dict(rows, orient="index")


def _changed(units: Sequence[UnitFacts]) -> dict[str, DataFrame]:
    found = {unit.name: _by_layer(unit.diagnostics, "changes") for unit in units}
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
