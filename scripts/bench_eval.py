"""Evaluation in batches against one question at a time, side by side, with the answers compared.

    python scripts/bench_eval.py                     the five test sets of the mini benchmark, shipped base
    python scripts/bench_eval.py --limit 100         fewer questions of each
    python scripts/bench_eval.py --processes 1       batches in one process
    python scripts/bench_eval.py --run runs/mini_dcl the model of a finished run instead of the base

Prints a table and one JSON object. A ratio is time one by one / time in batches, the median over turns; above 1 is what
batches gain. `different` counts answers that are not the same text. One by one is asked by one process that has all
threads; batches are shared by the processes, as under torchrun, and so are the threads. Until its turn a process waits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench.measure import side_by_side
from rich.console import Console
from rich.table import Table

from mllm_keeplora import load_config
from mllm_keeplora.config import EvalConfig
from mllm_keeplora.data import Benchmark, load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.eval.harness import evaluate_set
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.models import load_base
from mllm_keeplora.system import distributed, files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run; default: the untouched base")
    parser.add_argument("--limit", type=int, default=400, help="questions of each set")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count()), help="that share the batches")
    parser.add_argument("--dtype", default="auto", help="of the base: float32 on a CPU, or bfloat16")
    options = parser.parse_args()
    if options.processes > 1 and "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])
    with distributed.process_group():
        base, model, benchmark = _opened(options.run, options.dtype)
        lines = []
        for name in benchmark.domains:
            lines.append(_line(base, model, benchmark, name, options))
            if distributed.is_main():
                print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
        if distributed.is_main():
            _show(lines)
            settings = {key: getattr(options, key) for key in ("threads", "processes", "batch_size")}
            print(json.dumps({**settings, "lines": lines}))


def _opened(run: Path | None, dtype: str) -> tuple[Any, Any, Benchmark]:
    if run is None:
        config = load_config("mini_dcl", [f"base.dtype={dtype}"])
        base = load_base(config.base, "frozen")
        return base, base.model, load_benchmark(config)
    saved = load_run(run)
    return saved.base, saved.restore(None), saved.benchmark


def _line(base: Any, model: Any, benchmark: Benchmark, name: str, options: argparse.Namespace) -> dict[str, Any]:
    records = evenly_spaced(benchmark.test_records(name), options.limit)
    folder = Path(distributed.from_main(tempfile.mkdtemp()))

    def ask(size: int) -> list[str]:
        path = folder / f"{size}.jsonl"
        evaluate_set(base, model, records, benchmark.graded(name), path, EvalConfig(batch_size=size))
        return [row["prediction"] for row in files.read_json_lines(path)]

    def one_by_one() -> list[str]:
        torch.set_num_threads(options.threads)
        with _alone() as is_asked:
            answers = ask(1) if is_asked else []
        distributed.barrier()
        return answers

    def in_batches() -> list[str]:
        torch.set_num_threads(max(1, options.threads // options.processes))
        return ask(options.batch_size)

    timing = side_by_side(one_by_one, in_batches, options.repeats)
    different = sum(one != other for one, other in zip(one_by_one(), in_batches(), strict=False))
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder)
    return {
        "set": name, "questions": len(records), "ratio": timing.ratio, "one_by_one_s": timing.ours,
        "batches_s": timing.reference, "different": different,
    }  # fmt: skip


@contextmanager
def _alone() -> Iterator[bool]:
    """The main process as if it were the only one; whether this is it."""
    is_main, kept = distributed.is_main(), {key: os.environ.pop(key, None) for key in ("RANK", "WORLD_SIZE")}
    try:
        yield is_main
    finally:
        os.environ.update({key: value for key, value in kept.items() if value is not None})


def _show(lines: list[dict[str, Any]]) -> None:
    table = Table("set", "questions", "one by one", "batches", "ratio", "different answers")
    for line in lines:
        seconds = (f"{line[key]:.1f} s" for key in ("one_by_one_s", "batches_s"))
        table.add_row(line["set"], str(line["questions"]), *seconds, f"{line['ratio']:.1f}", str(line["different"]))
    Console().print(table)


if __name__ == "__main__":
    main()
