"""From answers to scores: rows of a predictions file, what went wrong with their form, what to hand in elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.data import Record, TestSet
from mllm_keeplora.metrics import SET_SCORERS, UNGRADED, grade, mistake, score
from mllm_keeplora.system import files

HOW = ("batch_size", "max_new_tokens", "dtype")  # how answers came about; grading them again does not change it


@dataclass(frozen=True)
class Graded:
    """Scores in [0, 1] in the order of the records, and the set's score in percent; None where nothing can be said."""

    scores: Sequence[float | None]
    percent: float | None
    parts: Mapping[str, float]


def grade_set(part: TestSet, records: Sequence[Record], predictions: Sequence[str]) -> Graded:
    """Grade answers by the set's own rule."""
    if part.scorer in UNGRADED:
        return Graded([None] * len(predictions), None, {})
    found = grade(
        part.scorer,
        predictions,
        [record.answer for record in records],
        [record.question for record in records],
        [record.media[0].path.name if record.media else "" for record in records],
    )
    return Graded(found.scores, found.percent, found.parts)


def rows_of(
    records: Sequence[Record], predictions: Sequence[str], scores: Sequence[float | None], cut: Sequence[bool]
) -> list[dict[str, Any]]:
    """Rows of a predictions file: id, question, answer, prediction, score; `cut` where the token limit ended it."""
    rows = []
    for record, prediction, value, is_cut in zip(records, predictions, scores, cut, strict=True):
        row = {
            "id": record.id,
            "question": record.question,
            "answer": list(record.answer) if isinstance(record.answer, tuple) else record.answer,
            "prediction": prediction,
            "score": value,
        }
        rows.append({**row, "cut": True} if is_cut else row)
    return rows


def write_graded(
    predictions: Path, rows: Sequence[Mapping[str, Any]], part: TestSet, graded: Graded, how: Mapping[str, Any]
) -> None:
    """Write a predictions file and, beside it, the set's figures and how it was asked (batch, answer length, dtype)."""
    files.write_json_lines(predictions, rows)
    rules = {"scorer": part.scorer, "prompt_suffix": part.prompt_suffix, "image_mode": part.image_mode}
    figures = {"percent": graded.percent, "parts": dict(graded.parts), **rules, **how}
    files.write_json(figures_file(predictions), figures)


def stored_figures(predictions: Path) -> dict[str, Any]:
    """What `write_graded` left beside a predictions file; empty where nothing is there."""
    path = figures_file(predictions)
    return files.read_json(path) if path.is_file() else {}


def stored_percent(predictions: Path, part: TestSet) -> float | None:
    """A set's score in percent from its predictions file; None where there is none, or where it is not graded."""
    if not predictions.is_file():
        return None
    if part.scorer in SET_SCORERS:
        return stored_figures(predictions).get("percent")
    scores = [row["score"] for row in files.read_json_lines(predictions)]
    return None if not scores or None in scores else 100.0 * sum(scores) / len(scores)


def figures_file(predictions: Path) -> Path:
    """Where a set's figures lie."""
    return predictions.with_name(f"{predictions.stem}.figures.json")


def errors_of(rows: Iterable[Mapping[str, Any]], part: TestSet) -> dict[str, int]:
    """How many answers went wrong in which form; empty for a set that is not graded, or not answer by answer."""
    found: Counter[str] = Counter()
    if part.scorer in SET_SCORERS:  # no caption is wholly right
        return {}
    for row in rows:
        if row["score"] is not None and row["score"] < 1:
            found[mistake(row["prediction"], row["answer"], row.get("cut", False), is_right=False)] += 1
    return dict(found.most_common())


def strict_percent(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """A second opinion beside the official rule: share of answers that are the gold one word by word, in percent."""
    if any(row["answer"] is None for row in rows):
        return None
    hits = 0.0
    for row in rows:
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        hits += max(score("strict", prediction=row["prediction"], answer=gold) for gold in golds)
    return 100.0 * hits / len(rows)


def submission_file(predictions: Path) -> Path:
    """Where answers lie that are graded elsewhere, in the official prediction format."""
    return predictions.with_name(f"{predictions.stem}.submit.jsonl")


def answer_files(predictions: Path) -> list[Path]:
    """What there is of a set's answers: predictions, figures, what to hand in elsewhere."""
    return [path for path in (predictions, figures_file(predictions), submission_file(predictions)) if path.is_file()]


def submission_rows(records: Sequence[Record], predictions: Sequence[str], part: TestSet) -> list[dict[str, Any]]:
    """Lines as the official runners write them: question_id, prompt with its suffix, text."""
    return [
        {"question_id": record.id, "prompt": record.question + part.suffix_for(record), "text": text}
        for record, text in zip(records, predictions, strict=True)
    ]


def answers_to(rows: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> bool:
    """Whether rows of a predictions file answer these questions, in their order."""
    return [(row["id"], row["question"]) for row in rows] == [(record.id, record.question) for record in records]


def regrade(predictions: Path, part: TestSet, records: Sequence[Record]) -> float | None:
    """Grade stored answers again, by the rule that the set has now; no model is needed.

    Raises:
        ValueError: the stored answers are to other questions.
    """
    rows = files.read_json_lines(predictions)
    if not answers_to(rows, records):
        raise ValueError(f"{predictions} answers other questions than the set has now")
    graded = grade_set(part, records, [row["prediction"] for row in rows])
    told = rows_of(records, [row["prediction"] for row in rows], graded.scores, [row.get("cut", False) for row in rows])
    how = {key: value for key, value in stored_figures(predictions).items() if key in HOW}
    write_graded(predictions, told, part, graded, how)
    return graded.percent
