"""Rows of the score matrix: which sets are asked after which unit, and what a run's predictions say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_keeplora import files
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.eval.harness import evaluate_set, mean_score
from mllm_keeplora.metrics import BlindAnswerer, score
from mllm_keeplora.models import Base
from mllm_keeplora.runs import DomainDir, Unit


def asked_records(benchmark: Benchmark, name: str, config: RunConfig) -> list[Record]:
    """Test records of a domain or suite, evenly thinned to the run's limit."""
    records = benchmark.test_records(name)
    limit = config.eval.limit if name in benchmark.domains else config.eval.suite_limit
    return records if limit is None else evenly_spaced(records, limit)


def sets_after(unit: Unit, units: Sequence[Unit], benchmark: Benchmark, config: RunConfig) -> list[str]:
    """Names of the sets graded after a unit (index 0: before the first): seen or all domains, then every suite."""
    if unit.index == 0 and not config.eval.zero_shot:
        return []
    seen = {name for each in units[: unit.index] for name in each.domains}
    everything = unit.index == 0 or config.eval.domains == "all"
    return [*(name for name in benchmark.domains if everything or name in seen), *benchmark.suites]


def evaluate_named(
    base: Base, model: Any, benchmark: Benchmark, name: str, config: RunConfig, folder: DomainDir
) -> dict[str, float | int]:
    """Grade one domain or suite with the model as it is now; facts for the ledger."""
    records = asked_records(benchmark, name, config)
    part = benchmark.graded(name)
    percent = evaluate_set(
        base,
        model,
        records,
        part,
        folder.predictions(name),
        title=f"{folder.path.name}: {name}",
        batch_size=config.eval.batch_size,
        max_new_tokens=config.eval.max_new_tokens,
    )
    return {"score": percent, "questions": len(records)}


def stored_score(folder: DomainDir, name: str) -> float | None:
    """Mean score in percent of stored predictions; None where none were made."""
    path = folder.predictions(name)
    return mean_score(files.read_json_lines(path)) if path.is_file() else None


def blind_score(benchmark: Benchmark, name: str, config: RunConfig) -> float:
    """Score in percent of the most frequent training answer per question text: what no look at the image is worth."""
    pairs = [pair for record in benchmark.train_records(name) for pair in record.question_answers()]
    blind, part = BlindAnswerer(pairs), benchmark.graded(name)
    records = asked_records(benchmark, name, config)
    rows = [
        {"score": score(part.scorer, prediction=blind.answer(r.question), answer=r.answer, question=r.question)}
        for r in records
    ]
    return mean_score(rows)
