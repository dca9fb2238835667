"""Results as tables for a terminal of 80 to 100 columns."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mllm_keeplora.report.render.groups import Group as RunGroup
from mllm_keeplora.report.render.groups import group_runs, mean_and_sd, spread_text
from mllm_keeplora.report.render.view import (
    METRICS,
    Metric,
    Results,
    Row,
    Score,
    duration_text,
    memory_text,
    metric_text,
    run_title,
    score_sheet,
    score_text,
)

STYLES = {"reference": "italic", "general": "cyan", "learned": "bold green", "seen": "", "unseen": "dim"}


def results_table(results: Results) -> RenderableType:
    """Show one run, by the content of its results.json: its score sheet, its metrics, the time of every stage."""
    facts = [f"{key} {results[key]}" for key in ("strategy", "base", "benchmark", "seed") if key in results]
    metrics = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for metric in METRICS:
        metrics.add_column(metric.label, justify="right")
    metrics.add_row(*(Text(metric_text(each, results["metrics"].get(each.key)), style="bold") for each in METRICS))
    title, told = Text(run_title(results), style="bold"), Text(" · ".join(facts), style="dim")
    parts = [title, told, _sheet_table(results), metrics]
    if results.get("wall_seconds"):
        parts += [Text(""), _times(results)]
    return Group(*parts)


def compare_table(results_list: Sequence[Results]) -> RenderableType:
    """Show runs side by side: metrics, then the final score on every domain; the best of a column is bold.

    Runs that differ by seed alone are one row, mean over standard deviation. The references lie below: what the base
    model answers, and the most frequent answer without looking at the image.

    Args:
        results_list: results of at least one run, all on the same domains in whatever order.

    Raises:
        UserError: there is no run, or the runs cannot be compared (see `group_runs`).
    """
    groups = group_runs(results_list)
    domains = list(results_list[0]["domains"])
    return Group(
        Text("Metrics", style="bold"),
        _ranked_table(groups, {metric: [group.metric(metric.key) for group in groups] for metric in METRICS}),
        Text("Final score", style="bold"),
        _ranked_table(
            groups,
            {Metric(domain, domain, ""): [group.finals(domain) for group in groups] for domain in domains},
            reference_rows(groups),
        ),
    )


def reference_rows(groups: Sequence[RunGroup]) -> list[Row]:
    """Take zero-shot and blind scores of the first run that has them, in the first group's order of domains."""
    rows: dict[str, Row] = {}
    wanted = groups[0].runs[0]["domains"]
    for group in groups:
        domains = group.runs[0]["domains"]
        for row in score_sheet(group.runs[0]).references:
            own = Row(row.label, tuple(row.scores[domains.index(domain)] for domain in wanted))
            if own.is_measured:
                rows.setdefault(row.label, own)
    return list(rows.values())


def _ranked_table(
    groups: Sequence[RunGroup], columns: Mapping[Metric, Sequence[Sequence[Score]]], references: Sequence[Row] = ()
) -> Table:
    """A row a group, mean over spread; the best mean of a column is marked where there is something to choose from."""
    table = _plain_table("run", [column.label for column in columns])
    texts = [[Text(group.label) for group in groups]]
    for column, cells in columns.items():
        means = [mean_and_sd(cell)[0] for cell in cells]
        measured = [mean for mean in means if mean is not None]
        best = (max if column.higher_is_better else min)(measured) if len(measured) > 1 else "none"
        styles = ["bold green" if mean == best else "" for mean in means]
        texts.append([Text(spread_text(column, cell, "\n"), style) for cell, style in zip(cells, styles, strict=True)])
    for row in zip(*texts, strict=True):
        table.add_row(*row)
    for row in references:
        scores = row.scores[: len(columns)]
        table.add_row(Text(row.label), *(Text(score_text(score)) for score in scores), style=STYLES["reference"])
    return table


def _sheet_table(results: Results) -> Table:
    sheet = score_sheet(results)
    widths = [max(len(row.label) for row in sheet.stages), *(max(len(name), 5) for name in sheet.columns)]
    table = _plain_table("", sheet.columns, gap=3 if sum(widths) + 3 * len(widths) <= 80 else 2)
    for suite in table.columns[1 + len(sheet.domains) :]:
        suite.header_style = "cyan"
    counts = results.get("questions") or {}
    if counts:
        table.add_row(Text("questions"), *(Text(str(counts.get(name, ""))) for name in sheet.columns), style="dim")
    for i, row in enumerate(sheet.measured, start=1):
        cells = [
            Text(score_text(score), style=STYLES[row.phase(j, len(sheet.domains))] if score is not None else "dim")
            for j, score in enumerate(row.scores)
        ]
        table.add_row(Text(row.label), *cells, end_section=i == len(sheet.references))
    return table


def _times(results: Results) -> Columns:
    seconds = results["wall_seconds"]
    parts = [Text.assemble((stage, "dim"), " ", duration_text(value)) for stage, value in seconds.items()]
    parts.append(Text.assemble(("total", "dim"), " ", (duration_text(sum(seconds.values())), "bold")))
    if results.get("peak_memory_bytes"):
        parts.append(Text.assemble(("peak memory", "dim"), " ", memory_text(results["peak_memory_bytes"])))
    return Columns(parts, padding=(0, 3))


def _plain_table(corner: str, columns: Sequence[str], gap: int = 2) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(Text(corner), overflow="fold")
    for column in columns:
        longest_word = max((len(word) for word in column.split()), default=1)
        table.add_column(Text(column), justify="right", overflow="fold", min_width=min(longest_word, 12))
    return table


def memory_table(stages: Mapping[str, Mapping[str, float]], host: float, where: str) -> RenderableType:
    """Show the memory that a run is expected to take on each device, by stage.

    Args:
        stages: stage -> what takes it -> bytes.
        host: bytes on the host beside that, 0 for none.
        where: device and precision that it was computed for.
    """
    table = Table(
        "stage", "in all", "of which", box=box.SIMPLE, title=f"expected memory ({where})", title_justify="left"
    )
    for stage, parts in stages.items():
        most = sorted(parts.items(), key=lambda part: -part[1])
        told = ", ".join(f"{name} {memory_text(value)}" for name, value in most if value >= 0.01 * sum(parts.values()))
        table.add_row(stage, memory_text(sum(parts.values())), told)
    if host:
        table.add_row("on the host", memory_text(host), "optimizer states (and weights under ZeRO-3)")
    return table
