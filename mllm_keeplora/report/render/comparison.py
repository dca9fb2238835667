"""Groups of runs side by side as tables and as one HTML file: what was measured, on what, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

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
    spread_text,
)
from mllm_keeplora.report.render.tables import reference_rows
from mllm_keeplora.report.render.view import METRICS, NOT_MEASURED, Metric, duration_text, score_text

SHOWN = ("last", "average", "transfer", "bwt", "plasticity", "general_retention")
COLUMNS = tuple(next(metric for metric in METRICS if metric.key == key) for key in SHOWN)
PLAIN = Metric("", "", "")
USES = {"answering", "learning"}  # what files are stored for


def comparison_tables(groups: Sequence[Group], settings: Mapping[str, str]) -> dict[str, Table]:
    """Give the tables of a comparison by title, without costs and differences if they cannot be told.

    Args:
        groups: from `group_runs`.
        settings: label -> the setting that was chosen for it.
    """
    domains = groups[0].runs[0]["domains"]
    rows = [[group.label, *(spread_text(PLAIN, group.finals(domain)) for domain in domains)] for group in groups]
    rows += [[row.label, *(score_text(s) for s in row.scores[: len(domains)])] for row in reference_rows(groups)]
    tables = {
        "Comparison": summary(groups, settings),
        "Final score by domain": (["", *domains], rows),
        "Cost": costs(groups),
        "Difference to sequential LoRA, seed by seed": paired(groups),
    }
    return {title: table for title, table in tables.items() if table}


def summary(groups: Sequence[Group], settings: Mapping[str, str]) -> Table:
    """Fill the main table: a row per group with mean ± sd over its seeds, then zero-shot and blind."""
    upper = find_group(groups, UPPER)
    heads = ["", *(["chosen"] if settings else []), "seeds", *(metric.label for metric in COLUMNS)]
    heads += ["of joint"] * (upper is not None) + ["wall time"]
    rows = []
    for group in groups:
        known = {"": group.label, "chosen": settings.get(group.label, NOT_MEASURED), "seeds": str(len(group.runs))}
        known |= {metric.label: spread_text(metric, group.metric(metric.key)) for metric in COLUMNS}
        mean, sd = mean_and_sd(shares_of_upper(group, upper))
        if mean is not None:
            known["of joint"] = f"{mean:.3f}" + (f" ±{sd:.3f}" if sd is not None else "")
        known["wall time"] = duration_text(fmean(sum(run["wall_seconds"].values()) for run in group.runs))
        rows.append([known.get(head, NOT_MEASURED) for head in heads])
    num_domains = len(groups[0].runs[0]["domains"])
    for reference in reference_rows(groups):
        last, transfer = (mean_and_sd(reference.scores[first:num_domains])[0] for first in (0, 1))
        known = {"": reference.label, "Last": score_text(last)}
        if reference.label == "zero-shot" and num_domains > 1:
            known["Transfer"] = score_text(transfer)  # what an untouched base would have there
        rows.append([known.get(head, NOT_MEASURED) for head in heads])
    return heads, rows


def paired(groups: Sequence[Group]) -> Table | None:
    """List differences to the reference strategy by seed; None if it is not among the groups, or nothing is paired."""
    reference = find_group(groups, REFERENCE)
    rows = []
    for group in groups if reference is not None else ():
        for metric in COLUMNS if group is not reference else ():
            differences = paired_differences(group, reference, metric.key).values()
            if differences:
                factor = 100 if metric.key == "general_retention" else 1
                listed = ", ".join(f"{factor * value:+.1f}" for value in differences)
                better = f"{sum(value > 0 for value in differences)} of {len(differences)}"
                rows.append([f"{group.label} − {reference.label}", metric.label, listed, better])
    return (["", "metric", "by seed", "better"], rows) if rows else None


def costs(groups: Sequence[Group]) -> Table | None:
    """List what each group costs: means over seeds, times relative to sequential LoRA; None if nothing is recorded.

    Trained parameters are the most of any domain. Stored is what the state after the last domain needs: to answer,
    and besides that to learn a further domain.
    """
    runs = [run for group in groups for run in group.runs]
    if not all((run.get("stored_bytes") or {}).keys() >= USES and run.get("trained_parameters") for run in runs):
        return None
    reference = find_group(groups, REFERENCE)
    rows = []
    for group in groups:
        row = [group.label, f"{max(max(run['trained_parameters']) for run in group.runs):,}"]
        for use in ("answering", "learning"):
            row.append(f"{mean_and_sd([run['stored_bytes'][use] for run in group.runs])[0] / 1e6:.2f} MB")
        for stages in (("gradient", "train", "consolidate"), ("evaluate",)):
            theirs = _median_seconds(reference, stages) if reference is not None else 0.0
            row.append(f"{_median_seconds(group, stages) / theirs:.2f}" if theirs else NOT_MEASURED)
        rows.append(row)
    heads = ["", "trained parameters", "stored to answer", "stored to go on", "training time", "answering time"]
    return heads, rows


def _median_seconds(group: Group, stages: Sequence[str]) -> float:
    """Of a run that had to share its machine, or was halted, the time says nothing: hence no mean."""
    return median(sum(run["wall_seconds"].get(stage, 0.0) for stage in stages) for run in group.runs)


def heat_maps(groups: Sequence[Group], dark: bool = False) -> bytes:
    """Draw the mean score matrices of all groups that learned one domain after another, side by side."""
    shown = [group for group in groups if group.strategy != UPPER] or list(groups)
    titles = []
    for group in shown:
        last, bwt = (mean_and_sd(group.metric(key))[0] for key in ("last", "bwt"))
        titles.append(f"{group.label}: Last {score_text(last)}, BWT {score_text(bwt, signed=True)}")
    return score_matrix_figure([mean_results(group) for group in shown], titles, dark)


def what_was_measured(groups: Sequence[Group]) -> dict[str, Any]:
    """Give what the comparison page says of the groups themselves: on what they were measured, and how surely."""
    run = groups[0].runs[0]
    identity, counts = run.get("identity") or {}, run.get("questions") or {}
    base = identity.get("base")
    measured = {
        "benchmark": run["benchmark"],
        "order": "; ".join(dict.fromkeys(" → ".join(group.runs[0]["domains"]) for group in groups)),
        "questions": ", ".join(f"{name} {count}" for name, count in counts.items()),
        "split": identity.get("split"),
        "base": f"{run['base']} ({base})" if base else run["base"],
        "generator": identity.get("generator"),
        "fingerprint of the data": identity.get("data"),
    }
    # Final scores by question type, a column per group, beside the blind answer's.
    typed = [group for group in groups if group.runs[0].get("per_type")]
    types = []
    for domain, kinds in typed[0].runs[0]["per_type"].items() if typed else ():
        blind = (typed[0].runs[0].get("blind_per_type") or {}).get(domain, {})
        for kind in kinds:
            values = ([run["per_type"].get(domain, {}).get(kind) for run in group.runs] for group in typed)
            means = [mean_and_sd(each)[0] for each in values]
            types.append([f"{domain}: {kind}", *map(score_text, [blind.get(kind), *means])])
    return {
        "measured": measured,
        "columns": COLUMNS,
        "counts": [count for name, count in counts.items() if name in run["domains"]],
        "types": (["", "blind", *(group.label for group in typed)], types),
    }
