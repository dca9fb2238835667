"""What others report on a shipped benchmark, beside a run's own row. The numbers stand in the benchmark's YAML."""

from __future__ import annotations

from mllm_keeplora.config import find_config, read_yaml, shipped
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.render.export import Table
from mllm_keeplora.report.render.view import score_text

METRICS = ("mfn", "mft", "maa", "bwt")


def published_table(results: Results) -> Table | None:
    """Put the run's final scores above the published ones; None if there are none.

    MFN is the mean after the last domain, MFT right after learning, MAA over the sequence (as MLLM-CL and MCITlib).
    """
    if results.benchmark not in shipped("benchmarks"):
        return None
    rows = read_yaml(find_config("benchmarks", results.benchmark)).get("published") or []
    if not rows:
        return None
    heads = ["", *results.domains, *(name.upper() for name in METRICS), "source"]
    finals = dict(zip(results.domains, results.score_matrix[-1], strict=True))
    own = {"method": "this run", "scores": finals, **results.metrics, "source": ""}
    table = []
    for row in [own, *rows]:
        scores = [score_text(row["scores"].get(domain)) for domain in results.domains]
        metrics = [score_text(row.get(name), signed=name == "bwt") for name in METRICS]
        table.append([row["method"], *scores, *metrics, row["source"]])
    return heads, table
