"""The diagnostics of a run as terminal tables and as sections of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mllm_keeplora.report.render.diagnostics import (
    CapacityRow,
    Matrix,
    UnitFacts,
    capacity_rows,
    changes,
    gradient_split,
    interference,
    overlap,
    update_by_depth,
)
from mllm_keeplora.report.render.diagnostics_figures import capacity_figure, matrix_figure, split_figure, update_figure
from mllm_keeplora.report.render.html import pair, picture, section

NOTHING = "–"
MEANING = {
    "capacity": "Share of input directions that are kept, median over blocks; free: the fewest left in a layer; "
    "domains left: until the fullest layer is full, at the mean growth so far and with nothing given up.",
    "split": "Energy of a domain's mean gradient: inside what is kept, inside the adapter's A, and the rest.",
    "changes": "Update: median of ||dW|| / ||W||. Leak: the largest ||dW Q|| / ||dW|| of a layer; of the factors, of "
    "the weights that are evaluated, and as a merge cast to bfloat16 would have it.",
    "depth": "Mean ||dW|| / ||W|| over the layers of a block.",
    "interference": "How strongly a domain's update answers to the inputs of a set, in percent of the layer's output.",
    "overlap": "Share of a set's input energy inside the directions kept at the start and by each domain, in percent.",
}


def inspection(units: Sequence[UnitFacts]) -> RenderableType:
    """Terminal tables of what was diagnosed; tables without numbers are left out."""
    names = [unit.name for unit in units]
    parts: list[RenderableType] = []
    for title, key, table in (
        ("Capacity", "capacity", _capacity_table(capacity_rows(units), names)),
        ("Gradient", "split", _split_table(gradient_split(units))),
        ("Updates", "changes", _changes_table(changes(units))),
        ("Interference", "interference", _matrix_table(interference(units), "update of")),
        ("Overlap", "overlap", _matrix_table(overlap(units), "inputs of")),
    ):
        if table is not None:
            parts += [Text(title, style="bold"), table, Text(MEANING[key], style="dim"), Text("")]
    return Group(*parts)


def inspection_sections(units: Sequence[UnitFacts]) -> list[str]:
    """Sections with pictures for a run's page; empty if nothing was diagnosed."""
    rows, split, updates = capacity_rows(units), gradient_split(units), update_by_depth(units)
    strengths, shares = interference(units), overlap(units)
    stages = ["start", *(unit.name for unit in units)]
    drawn = {}
    if rows:
        drawn["Capacity"] = ("capacity", lambda dark: capacity_figure(rows, stages[: len(rows[0].shares)], dark))
    if split:
        drawn["Gradient"] = ("split", lambda dark: split_figure(split, dark))
    if strengths.rows:
        drawn["Interference"] = ("interference", lambda dark: matrix_figure(strengths, "update of", "inputs of", dark))
    if shares.columns:
        drawn["Overlap"] = ("overlap", lambda dark: matrix_figure(shares, "inputs of", "kept by", dark))
    if updates:
        drawn["Update by depth"] = ("depth", lambda dark: update_figure(updates, dark))
    cards = [
        section(title, picture(title, draw(False), draw(True)) + f'<p class="note">{MEANING[key]}</p>', "figure")
        for title, (key, draw) in drawn.items()
    ]
    return [pair(*cards[i : i + 2]) for i in range(0, len(cards), 2)]


def _capacity_table(rows: Sequence[CapacityRow], names: Sequence[str]) -> Table | None:
    if not rows:
        return None
    table = _table("layers", "d_in", "start", *names[: len(rows[0].shares) - 1], "free", "domains left")
    for row in rows:
        left = NOTHING if row.units_left is None else f"{row.units_left:.1f}"
        table.add_row(row.kind, row.d_in, *(f"{100 * share:.0f} %" for share in row.shares), str(row.free), left)
    return table


def _split_table(split: Mapping[str, Mapping[str, float]]) -> Table | None:
    if not split:
        return None
    table = _table("domain", "protected", "captured", "discarded", "captured of the rest")
    for name, shares in split.items():
        table.add_row(name, *(f"{100 * value:.1f} %" for value in shares.values()))
    return table


def _changes_table(found: Mapping[str, Mapping[str, float]]) -> Table | None:
    if not found:
        return None
    table = _table("domain", "update", "leak", "evaluated", "as bfloat16")
    for name, values in found.items():
        leaks = (values.get(key) for key in ("leak", "leak_evaluated", "leak_bfloat16"))
        table.add_row(
            name, f"{100 * values['update']:.1f} %", *(NOTHING if leak is None else f"{leak:.1e}" for leak in leaks)
        )
    return table


def _matrix_table(matrix: Matrix, rows: str) -> Table | None:
    if not matrix.rows or not matrix.columns:
        return None
    table = _table(rows, *matrix.columns)
    for name, values in zip(matrix.rows, matrix.values, strict=True):
        table.add_row(name, *(NOTHING if value is None else f"{value:.1f}" for value in values))
    return table


def _table(first: str, *others: str) -> Table:
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
