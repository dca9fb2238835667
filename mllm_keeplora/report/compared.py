"""Comparisons as files: reads finished runs, writes a page, a Markdown table and pictures into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.render import (
    Group,
    as_markdown,
    costs,
    exported,
    finals,
    group_runs,
    heat_maps,
    paired,
    render_comparison,
    save_png,
    split_of,
    summary,
    trade_off_curves,
    trade_off_figure,
)
from mllm_keeplora.system import files

PAGE, TABLES, MATRICES, TRADE_OFF = "report.html", "tables.md", "score_matrices.png", "trade_off.png"


def load_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of run folders, of results.json files, or of all final runs of sweep folders.

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
    """How the settings of compared runs were chosen.

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
    """Compare finished runs: report.html, tables.md, score_matrices.png and, with several settings, trade_off.png.

    Raises:
        UserError: the runs cannot be compared.
    """
    groups = _grouped(results_list)
    choice = choice or Choice("", {}, results_list, ([], []), ())
    settings = {label: f"{choice.key.split('.')[-1]} {value:g}" for label, value in choice.values.items()}
    tried = _grouped(choice.tried)
    curves = trade_off_curves(tried)
    chosen = [
        (group.family, group.setting)
        for group in tried
        if choice.values and choice.values.get(group.family) == group.runs[0]["settings"].get(choice.key)
    ]
    tuning = choice.table if choice.table[0] else None
    page = render_comparison(title, groups, tried, settings, chosen, choice.notes, tuning)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / PAGE, page)
    tables = [("Comparison", summary(groups, settings)), ("Final score by domain", finals(groups))]
    if (spent := costs(groups)) is not None:
        tables.append(("Cost", spent))
    if (differences := paired(groups)) is not None:
        tables.append(("Difference to sequential LoRA, seed by seed", differences))
    if tuning is not None:
        tables.append((f"{choice.key} that was tried, Last on the {split_of(tried)} questions", tuning))
    files.write_text(folder / TABLES, "\n".join(f"{title}\n\n{as_markdown(table)}" for title, table in tables))
    for name, text in exported({"Comparison": tables[0][1], "Final scores": tables[1][1]}).items():
        if not name.endswith(".md"):  # those are in tables.md
            files.write_text(folder / name, text)
    save_png(heat_maps(groups), folder / MATRICES)
    if any(len(points) > 1 for points in curves.values()):
        save_png(trade_off_figure(curves, chosen), folder / TRADE_OFF)


def _grouped(results_list: Sequence[Mapping[str, Any]]) -> list[Group]:
    try:
        return group_runs(results_list)
    except ValueError as error:
        raise UserError(str(error)) from None
