"""Rows of the score matrix: which sets are asked after which unit, and what a run's predictions say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.eval.grading import grade_set
from mllm_keeplora.eval.harness import evaluate_set
from mllm_keeplora.metrics import UNGRADED, BlindAnswerer
from mllm_keeplora.models import Base
from mllm_keeplora.models.partition import answering
from mllm_keeplora.runs import DomainDir, Unit
from mllm_keeplora.system import files


def asked_records(benchmark: Benchmark, name: str, config: RunConfig) -> Sequence[Record]:
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
    base: Base, model: Any, benchmark: Benchmark, name: str, config: RunConfig, folder: DomainDir, **journal: Any
) -> dict[str, Any]:
    """Grade one domain or suite with the model as it is now; facts for the ledger. `journal`: as in `evaluate_set`."""
    records = asked_records(benchmark, name, config)
    part = benchmark.graded(name)
    with answering(model, config.eval.weights):
        percent = evaluate_set(
            base,
            model,
            records,
            part,
            folder.predictions(name),
            title=f"{folder.path.name}: {name}",
            batch_size=config.eval.batch_size,
            max_new_tokens=config.eval.max_new_tokens,
            settle_ties=config.eval.settle_ties,
            **journal,
        )
    return {"score": percent, "questions": len(records)}


def stored_rows(folder: DomainDir, name: str) -> list[dict[str, Any]] | None:
    """Rows of stored predictions; None where none were made."""
    path = folder.predictions(name)
    return files.read_json_lines(path) if path.is_file() else None


def blind_graded(benchmark: Benchmark, name: str, config: RunConfig) -> tuple[dict[str, float], float | None]:
    """What no look at the image is worth: the most frequent training answer per question text, graded.

    Returns:
        Record id -> score in [0, 1], and the set's score in percent; nothing and None for a set that is not graded.
    """
    part = benchmark.graded(name)
    if part.scorer in UNGRADED:
        return {}, None
    blind = BlindAnswerer(pair for record in benchmark.train_records(name) for pair in record.question_answers())
    records = asked_records(benchmark, name, config)
    graded = grade_set(part, records, [blind.answer(record.question) for record in records])
    return {record.id: score for record, score in zip(records, graded.scores, strict=True)}, graded.percent


def by_type(benchmark: Benchmark, name: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Mean score in percent per question type, largest type first; empty where the records name no types.

    Args:
        scores: record id -> score in [0, 1].
    """
    found: dict[str, list[float]] = {}
    for record in benchmark.test_records(name):
        if record.kind and scores.get(record.id) is not None:
            found.setdefault(record.kind, []).append(scores[record.id])
    return {kind: 100 * sum(marks) / len(marks) for kind, marks in sorted(found.items(), key=lambda k: -len(k[1]))}
