"""Comparisons as files: reads finished runs, writes a page, a Markdown table and pictures into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.render.comparison import comparison_tables, heat_maps, what_was_measured
from mllm_keeplora.report.render.export import as_markdown, exported
from mllm_keeplora.report.render.groups import group_runs, split_of, trade_off_curves
from mllm_keeplora.report.render.html import fill_page, in_both
from mllm_keeplora.report.render.trade_off import trade_off_figure
from mllm_keeplora.system import files


def load_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Load the results of run folders, of results.json files, or of all final runs of sweep folders.

    Raises:
        UserError: a path is none of them, or its run has no results yet.
    """
    found = []
    for path in paths:
        if (path / "final").is_dir():
            inside = sorted(path.glob("final/*/results.json"))
            if not inside:
                raise UserError(f"sweep {path} has no finished final run yet")
        else:
            inside = [path if path.suffix == ".json" else path / "results.json"]
        found += [Results.load(each).to_dict() for each in inside]
    return found


@dataclass(frozen=True)
class Choice:
    """Say how the settings of compared runs were chosen.

    Attributes:
        key: the dotted key that was tuned.
        values: label -> the value that was chosen.
        tried: results of every run that was tried, for the trade-off curve.
        table: heads and rows of what was tried.
        notes: sentences on the rule.
    """

    key: str
    values: Mapping[str, float]
    tried: Sequence[Mapping[str, Any]]
    table: tuple[list[str], list[list[str]]]
    notes: Sequence[str]


def write_comparison(
    folder: Path, title: str, results_list: Sequence[Mapping[str, Any]], choice: Choice | None = None
) -> None:
    """Write report.html, tables.md, score_matrices.png and, of several settings, trade_off.png on finished runs.

    Raises:
        UserError: the runs cannot be compared.
    """
    choice = choice or Choice("", {}, results_list, ([], []), ())
    groups, tried = group_runs(results_list), group_runs(choice.tried)
    settings = {label: f"{choice.key.split('.')[-1]} {value:g}" for label, value in choice.values.items()}
    chosen = [
        (group.family, group.setting)
        for group in tried
        if choice.values and choice.values.get(group.family) == group.runs[0]["settings"].get(choice.key)
    ]
    curves, trade_off = trade_off_curves(tried), None
    if any(len(points) > 1 for points in curves.values()):
        trade_off = in_both(lambda dark: trade_off_figure(curves, chosen, dark))
        files.write_atomically(folder / "trade_off.png", lambda path: path.write_bytes(trade_off[0]))
    maps = in_both(lambda dark: heat_maps(groups, dark))
    files.write_atomically(folder / "score_matrices.png", lambda path: path.write_bytes(maps[0]))
    tables = comparison_tables(groups, settings)
    page = fill_page(
        "comparison.html",
        title=title,
        notes=choice.notes,
        tables=tables,
        maps=maps,
        trade_off=trade_off,
        has_chosen=bool(chosen),
        split=split_of(tried),
        seeds=sorted({seed for group in tried for seed in group.seeds}),
        tuning=choice.table,
        **what_was_measured(groups),
    )
    files.write_text(folder / "report.html", page)
    finals = {"Comparison": tables["Comparison"], "Final scores": tables["Final score by domain"]}
    for name, text in exported(finals).items():
        if not name.endswith(".md"):  # those are in tables.md
            files.write_text(folder / name, text)
    if choice.table[1]:
        tables[f"{choice.key} that was tried, Last on the {split_of(tried)} questions"] = choice.table
    written = "\n".join(f"{title}\n\n{as_markdown(table)}" for title, table in tables.items())
    files.write_text(folder / "tables.md", written)
