"""What others report on a shipped benchmark, beside a run's own row. The numbers stand in the benchmark's YAML."""

from __future__ import annotations

from mllm_keeplora.config import find_config, read_yaml, shipped
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.render.export import Table
from mllm_keeplora.report.render.view import score_text

METRICS = ("mfn", "mft", "maa", "bwt")
MTIL = ("transfer", "average", "last")  # what rows of a benchmark in the manner of MTIL have
KINDS = {"last": "", "transfer": ", Transfer", "average": ", Average"}  # what a row's scores are -> behind its name


def published_table(results: Results) -> Table | None:
    """Put the run's final scores above the published ones; None if there are none.

    MFN is the mean after the last domain, MFT right after learning, MAA over the sequence (as MLLM-CL and MCITlib).
    Rows with an `order` are those of runs in it. Rows `of: transfer` and `of: average` (MTIL) have means over the rows
    before a domain and over all rows; the run's own means stand above them.
    """
    if results.benchmark not in shipped("benchmarks"):
        return None
    values = read_yaml(find_config("benchmarks", results.benchmark))
    orders = [name for name, order in (values.get("orders") or {}).items() if order == results.domains]
    rows = [row for row in values.get("published") or [] if row.get("order") in (None, *orders)]
    if not rows:
        return None
    metrics = MTIL if any(name in row for row in rows for name in MTIL) else METRICS
    table = []
    for kind, told in KINDS.items():
        published = [row for row in rows if row.get("of", "last") == kind]
        own = {"method": "this run", "scores": _own_scores(results, kind), "source": ""}
        for row in [own | (results.metrics if kind == "last" else {}), *published] if published else ():
            scores = [score_text(row["scores"].get(domain)) for domain in results.domains]
            means = [score_text(row.get(name), signed=name == "bwt") for name in metrics]
            table.append([f"{row['method']}{told}", *scores, *means, row["source"]])
    heads = [name.upper() if metrics is METRICS else name.capitalize() for name in metrics]
    return ["", *results.domains, *heads, "source"], table


def _own_scores(results: Results, kind: str) -> dict[str, float | None]:
    """Give the run's score of each domain: after the last one, or a mean of its column; None if one is missing."""
    size, found = len(results.domains), {}
    for column, domain in enumerate(results.domains):
        rows = {"last": range(size - 1, size), "transfer": range(column), "average": range(size)}[kind]
        cells = [results.score_matrix[row][column] for row in rows]
        found[domain] = sum(cells) / len(cells) if cells and None not in cells else None
    return found
