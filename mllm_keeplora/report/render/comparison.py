"""Groups of runs side by side as one HTML file and as Markdown: what was measured, on what, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from mllm_keeplora.report.render.costs import costs
from mllm_keeplora.report.render.export import Table
from mllm_keeplora.report.render.figures import score_matrix_figure
from mllm_keeplora.report.render.groups import (
    REFERENCE,
    UPPER,
    Group,
    find_group,
    mean_and_sd,
    mean_results,
    paired_differences,
    shares_of_upper,
    split_of,
    spread_text,
    trade_off_curves,
)
from mllm_keeplora.report.render.html import document, html_table, pair, picture, section
from mllm_keeplora.report.render.tables import reference_rows
from mllm_keeplora.report.render.trade_off import trade_off_figure
from mllm_keeplora.report.render.view import METRICS, NOT_MEASURED, Metric, duration_text, score_text

SHOWN = ("last", "average", "transfer", "bwt", "plasticity", "general_retention")
COLUMNS = tuple(next(metric for metric in METRICS if metric.key == key) for key in SHOWN)


def summary(groups: Sequence[Group], settings: Mapping[str, str]) -> Table:
    """The main table: a row per group with mean ± sd over its seeds, then zero-shot and blind; heads first.

    Args:
        groups: from `group_runs`.
        settings: label -> the setting that was chosen for it; shown where there is any.
    """
    upper = find_group(groups, UPPER)
    heads = ["", *(["chosen"] if settings else []), "seeds", *(metric.label for metric in COLUMNS)]
    heads += ["of joint"] * (upper is not None) + ["wall time"]
    rows = []
    for group in groups:
        row = [group.label, *([settings.get(group.label, NOT_MEASURED)] if settings else []), str(len(group.runs))]
        row += [spread_text(metric, group.metric(metric.key)) for metric in COLUMNS]
        if upper is not None:
            row.append(_share_text(shares_of_upper(group, upper)))
        rows.append([*row, duration_text(mean_and_sd(group.seconds())[0] or 0.0)])
    num_domains = len(groups[0].runs[0]["domains"])
    for reference in reference_rows(groups):
        last, transfer = (mean_and_sd(reference.scores[first:num_domains])[0] for first in (0, 1))
        known = {"": reference.label, "Last": score_text(last)}
        if reference.label == "zero-shot" and num_domains > 1:
            known["Transfer"] = score_text(transfer)  # what an untouched base would have there
        rows.append([known.get(head, NOT_MEASURED) for head in heads])
    return heads, rows


def finals(groups: Sequence[Group]) -> Table:
    """Score on every domain after the whole sequence, with the references below."""
    domains = list(groups[0].runs[0]["domains"])
    plain = Metric("", "", "")
    rows = [[group.label, *(spread_text(plain, group.finals(domain)) for domain in domains)] for group in groups]
    rows += [[row.label, *(score_text(s) for s in row.scores[: len(domains)])] for row in reference_rows(groups)]
    return ["", *domains], rows


def paired(groups: Sequence[Group]) -> Table | None:
    """Differences to the reference strategy by seed; None where it is not among the groups, or nothing is paired."""
    reference = find_group(groups, REFERENCE)
    if reference is None:
        return None
    rows = []
    for group in groups:
        for metric in COLUMNS:
            differences = paired_differences(group, reference, metric.key)
            if group is reference or not differences:
                continue
            better = sum(value > 0 for value in differences.values())
            factor = 100 if metric.key == "general_retention" else 1
            listed = ", ".join(f"{factor * value:+.1f}" for value in differences.values())
            rows.append([f"{group.label} − {reference.label}", metric.label, listed, f"{better} of {len(differences)}"])
    return (["", "metric", "by seed", "better"], rows) if rows else None


def heat_maps(groups: Sequence[Group], dark: bool = False) -> bytes:
    """Mean score matrices of all groups that learnt one domain after another, side by side."""
    shown = [group for group in groups if group.strategy != UPPER] or list(groups)
    titles = [f"{g.label}: Last {_mean_text(g, 'last')}, BWT {_mean_text(g, 'bwt', True)}" for g in shown]
    return score_matrix_figure([mean_results(group) for group in shown], titles, dark)


def render_comparison(
    title: str,
    groups: Sequence[Group],
    tried: Sequence[Group],
    settings: Mapping[str, str] | None = None,
    chosen: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    tuning: Table | None = None,
) -> str:
    """Render the comparison page.

    Args:
        title: heading.
        groups: from `group_runs`, one setting each or several.
        tried: groups of every setting; their trade-off is drawn where a family has at least two.
        settings: label -> chosen setting.
        chosen: (family, setting) points to mark on the curves.
        notes: sentences on how the numbers came about, put above the rest.
        tuning: a table of the settings that were tried.

    Returns:
        The text of the page.
    """
    parts = [f"<h1>{escape(title)}</h1>", _measured(groups, notes)]
    parts.append(section("Comparison", html_table(summary(groups, settings or {})) + _meanings() + _how_sure(groups)))
    spent = costs(groups)
    if spent is not None:
        parts.append(section("Cost", html_table(spent) + _cost_note()))
    differences = paired(groups)
    if differences is not None:
        parts.append(section("Difference to sequential LoRA, seed by seed", html_table(differences)))
    maps = [heat_maps(groups, dark) for dark in (False, True)]
    note = '<p class="note">Framed: the domain just learned. Hatched: not measured.</p>'
    parts.append(section("Mean score matrices", picture("Heat maps of the score matrices", *maps, wide=True) + note))
    final = section("Final score by domain", html_table(finals(groups)))
    curves = trade_off_curves(tried)
    if any(len(points) > 1 for points in curves.values()):
        drawn = [trade_off_figure(curves, chosen, dark) for dark in (False, True)]
        numbers = sorted({seed for group in tried for seed in group.seeds})
        seeds = f"{'seeds' if len(numbers) > 1 else 'seed'} {', '.join(map(str, numbers))}"
        note = f"Each point is one setting on the {split_of(tried)} questions, {seeds}. Up and right is better."
        note = f'<p class="note">{note}{" A ring marks the chosen one." if chosen else ""}</p>'
        parts.append(pair(section("Trade-off", picture("Trade-off curve", *drawn) + note, "figure"), final))
    else:
        parts.append(final)
    if tuning is not None:
        note = f'<p class="note">Last in percent on the {split_of(tried)} questions, by setting.</p>'
        parts.append(section("Settings that were tried", html_table(tuning) + note))
    parts.append(_types(groups))
    return document(title, parts)


def _cost_note() -> str:
    note = (
        "Trained parameters: the most of any domain. Stored: what the state after the last domain needs to answer, and "
        "besides to learn a further domain. Times are relative to sequential LoRA's, on whatever else the machine did."
    )
    return f'<p class="note">{note}</p>'


def _measured(groups: Sequence[Group], notes: Sequence[str]) -> str:
    run = groups[0].runs[0]
    identity = run.get("identity") or {}
    counts = run.get("questions") or {}
    facts = {
        "benchmark": run["benchmark"],
        "order": "; ".join(dict.fromkeys(" → ".join(group.runs[0]["domains"]) for group in groups)),
        "questions": ", ".join(f"{name} {count}" for name, count in counts.items()),
        "split": identity.get("split"),
        "base": f"{run['base']} ({identity.get('base')})" if identity.get("base") else run["base"],
        "generator": identity.get("generator"),
        "fingerprint of the data": identity.get("data"),
    }
    rows = "".join(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value)
    text = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return section("What was measured", f'{text}<dl class="keys">{rows}</dl>')


def _meanings() -> str:
    """What the columns say, in one paragraph."""
    said = [f"{metric.label}: {metric.meaning}" for metric in COLUMNS]
    said += ["of joint: Last as a share of joint training's", "wall time: of a whole run, evaluation included"]
    said += ["zero-shot: the base model before any training"]
    said += ["blind: the most frequent training answer to a question, without looking at the image"]
    return f'<p class="note">{". ".join(said)}. In percent and points.</p>'


def _how_sure(groups: Sequence[Group]) -> str:
    """What the spread covers, and the sampling error that it does not."""
    run = groups[0].runs[0]
    counts = [count for name, count in (run.get("questions") or {}).items() if name in run["domains"]]
    text = "± is the standard deviation (n − 1) over seeds (start of the branches, order of the batches); the base, "
    text += "the training data, the order of domains and the questions are the same for all."
    if counts:
        cell = 50 / math.sqrt(min(counts))
        text += f" Beyond that, {min(counts)} questions give a cell a standard error of up to {cell:.1f} points, the "
        text += f"mean of {len(counts)} domains up to {cell / math.sqrt(len(counts)):.1f}; all rows answer the same "
        text += "questions, so that their errors go together."
    return f'<p class="note">{text}</p>'


def _types(groups: Sequence[Group]) -> str:
    """Final score by question type, a column per group, beside the blind answer's."""
    with_types = [group for group in groups if group.runs[0].get("per_type")]
    if not with_types:
        return ""
    blind = with_types[0].runs[0].get("blind_per_type") or {}
    rows = []
    for domain, kinds in with_types[0].runs[0]["per_type"].items():
        for kind in kinds:
            cells = [
                mean_and_sd([run["per_type"].get(domain, {}).get(kind) for run in group.runs])[0]
                for group in with_types
            ]
            reference = blind.get(domain, {}).get(kind)
            rows.append([f"{domain}: {kind}", score_text(reference), *map(score_text, cells)])
    table = html_table((["", "blind", *(group.label for group in with_types)], rows))
    return f"<details><summary>Final score by question type, means over seeds</summary>{table}</details>"


def _mean_text(group: Group, key: str, signed: bool = False) -> str:
    return score_text(mean_and_sd(group.metric(key))[0], signed)


def _share_text(shares: Sequence[float | None]) -> str:
    mean, sd = mean_and_sd(shares)
    if mean is None:
        return NOT_MEASURED
    return f"{mean:.3f}" + (f" ±{sd:.3f}" if sd is not None else "")
