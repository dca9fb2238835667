"""Evaluation in batches against one question at a time, side by side in one process, with the answers compared.

    python scripts/bench_eval.py                     the five test sets of the mini benchmark, shipped base
    python scripts/bench_eval.py --limit 100         fewer questions of each
    python scripts/bench_eval.py --run runs/mini_dcl the model of a finished run instead of the base

Prints a table and one JSON object. A ratio is time one by one / time in batches, the median over turns; above 1 is what
batches gain. `different` counts answers that are not the same text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench.measure import side_by_side
from rich.console import Console
from rich.table import Table

from mllm_keeplora import files, load_config
from mllm_keeplora.data import Benchmark, load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.eval.harness import evaluate_set
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.models import load_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run; default: the untouched base")
    parser.add_argument("--limit", type=int, default=400, help="questions of each set")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, model, benchmark = _opened(options.run)
    lines = []
    for name in benchmark.domains:
        lines.append(_line(base, model, benchmark, name, options))
        print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    _show(lines)
    print(json.dumps({"threads": options.threads, "batch_size": options.batch_size, "lines": lines}))


def _opened(run: Path | None) -> tuple[Any, Any, Benchmark]:
    if run is None:
        config = load_config("mini_dcl")
        base = load_base(config.base, "frozen")
        return base, base.model, load_benchmark(config)
    saved = load_run(run)
    return saved.base, saved.restore(len(saved.run.finished_units)), saved.benchmark


def _line(base: Any, model: Any, benchmark: Benchmark, name: str, options: argparse.Namespace) -> dict[str, Any]:
    records = evenly_spaced(benchmark.test_records(name), options.limit)
    with tempfile.TemporaryDirectory() as folder:

        def ask(size: int) -> list[str]:
            path = Path(folder) / f"{size}.jsonl"
            evaluate_set(base, model, records, benchmark.graded(name), path, name, size)
            return [row["prediction"] for row in files.read_json_lines(path)]

        timing = side_by_side(lambda: ask(1), lambda: ask(options.batch_size), options.repeats)
        different = sum(one != other for one, other in zip(ask(1), ask(options.batch_size), strict=True))
    return {
        "set": name, "questions": len(records), "ratio": timing.ratio, "one_by_one_s": timing.ours,
        "batches_s": timing.reference, "different": different,
    }  # fmt: skip


def _show(lines: list[dict[str, Any]]) -> None:
    table = Table("set", "questions", "one by one", "batches", "ratio", "different answers")
    for line in lines:
        seconds = (f"{line[key]:.1f} s" for key in ("one_by_one_s", "batches_s"))
        table.add_row(line["set"], str(line["questions"]), *seconds, f"{line['ratio']:.1f}", str(line["different"]))
    Console().print(table)


if __name__ == "__main__":
    main()
