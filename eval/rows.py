"""Rows of the score matrix: which sets are asked after which unit, and what a run's predictions say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.eval.grading import grade_set
from mllm_keeplora.eval.harness import evaluate_set
from mllm_keeplora.metrics import UNGRADED, BlindAnswerer
from mllm_keeplora.models import Base
from mllm_keeplora.models.partition import answering
from mllm_keeplora.runs import DomainDir, Unit


def asked_records(benchmark: Benchmark, name: str, config: RunConfig) -> Sequence[Record]:
    """Read the test records of a domain or suite, evenly thinned to the run's limit."""
    records = benchmark.test_records(name)
    limit = config.eval.limit if name in benchmark.domains else config.eval.suite_limit
    return records if limit is None else evenly_spaced(records, limit)


def sets_after(unit: Unit, units: Sequence[Unit], benchmark: Benchmark, config: RunConfig) -> list[str]:
    """List the sets graded after a unit (index 0: before the first): seen or all domains, then every suite."""
    if unit.index == 0 and not config.eval.zero_shot:
        return []
    seen = {name for each in units[: unit.index] for name in each.domains}
    everything = unit.index == 0 or config.eval.domains == "all"
    return [*(name for name in benchmark.domains if everything or name in seen), *benchmark.suites]


def evaluate_named(
    base: Base, model: Any, benchmark: Benchmark, name: str, config: RunConfig, folder: DomainDir, **journal: Any
) -> dict[str, Any]:
    """Grade one domain or suite with the model as it is now; facts for the ledger. `journal`: as in `evaluate_set`."""
    records, part, path = asked_records(benchmark, name, config), benchmark.graded(name), folder.predictions(name)
    with answering(model, config.eval.weights):
        percent = evaluate_set(base, model, records, part, path, config.eval, **journal)
    return {"score": percent, "questions": len(records)}


def collapses(rows: Mapping[str, Mapping[str, float | None]], points: float | None) -> list[str]:
    """Say in a sentence each which sets have fallen further than they may since they were last asked.

    Args:
        rows: after what -> set -> score in percent, in the order of the sequence; None where it was not measured.
        points: how far a set may fall; None for any number.
    """
    told, last = [], {}
    for after, scores in rows.items():
        for name, score in scores.items():
            if score is None:
                continue
            before, earlier = last.get(name, (None, None))
            if points is not None and before is not None and before - score > points:
                told.append(f"{name} has collapsed: {before:.1f} after {earlier}, {score:.1f} after {after}")
            last[name] = score, after
    return told


def chosen_sets(benchmark: Benchmark, names: Sequence[str] | None, whose: str, more: str = "") -> list[str]:
    """List the domains and suites that are asked for: those named, or all of them.

    Raises:
        UserError: an unknown name; `whose` and `more` begin and end the sentence.
    """
    allowed = [*benchmark.domains, *benchmark.suites]
    for name in names or ():
        if name not in allowed:
            raise UserError(f"{whose} has no domain or suite {name!r}; known: {known(allowed)}{more}")
    return allowed if names is None else list(names)


def blind_graded(benchmark: Benchmark, name: str, config: RunConfig) -> tuple[dict[str, float], float | None]:
    """Grade the most frequent training answer per question text: what no look at the image is worth.

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
    """Average a set's scores by question type.

    Args:
        benchmark, name: of the set.
        scores: record id -> score in [0, 1].

    Returns:
        Type -> mean score in percent, largest type first; empty where the records name no types.
    """
    found: dict[str, list[float]] = {}
    for record in benchmark.test_records(name):
        if record.kind and scores.get(record.id) is not None:
            found.setdefault(record.kind, []).append(scores[record.id])
    return {kind: 100 * sum(marks) / len(marks) for kind, marks in sorted(found.items(), key=lambda k: -len(k[1]))}
