"""From answers to scores: rows of a predictions file, what went wrong with their form, what to hand in elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import NotRequired, TypedDict

from mllm_keeplora.data import Record, TestSet
from mllm_keeplora.metrics import SET_SCORERS, UNGRADED, Grades, grade, mistake, score
from mllm_keeplora.models.family import Answer
from mllm_keeplora.system import distributed, files

HOW = ("batch_size", "max_new_tokens", "dtype")  # how answers came about; grading them again does not change it
FIGURES = ".figures.json"  # endings of what lies beside a predictions file
SUBMISSION = ".submit.jsonl"  # answers that are graded elsewhere, in the official prediction format


class Row(TypedDict):
    """A row of a predictions file."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)

    id: str
    question: str
    answer: str | list[str] | None
    prediction: str
    score: float | None
    cut: NotRequired[bool]
    probability: NotRequired[float]
    second: NotRequired[str | None]


class HowAsked(TypedDict, total=False):
    """How a set is asked and graded."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)

    scorer: str
    prompt_suffix: str | dict[str, str]
    image_mode: str
    batch_size: int
    max_new_tokens: int
    dtype: str


class Figures(HowAsked, total=False):
    """What lies beside a predictions file."""

    percent: float | None
    parts: dict[str, float]


def grade_set(part: TestSet, records: Sequence[Record], predictions: Sequence[str]) -> Grades:
    """Grade answers by the set's own rule, which must not be one of `UNGRADED`."""
    return grade(
        part.scorer,
        predictions,
        [record.answer for record in records],
        [record.question for record in records],
        [record.media[0].path.name if record.media else "" for record in records],
    )


def write_graded(
    predictions: Path, part: TestSet, records: Sequence[Record], answers: Sequence[Answer], how: Mapping[str, Any]
) -> float | None:
    """Grade answers and write the predictions file with the set's figures beside it (main process).

    Args:
        predictions: gets a row a record: id, question, answer, prediction, score; `cut` where the token limit ended it,
            `probability` and `second` where it was chosen from a list of classes.
        part: gives the rule.
        records, answers: in the same order.
        how: tells how the set was asked, by the keys of `HOW`.

    Returns:
        The set's score in percent; None where it cannot be graded here.
    """
    percent, parts, scores = None, {}, [None] * len(records)
    if part.scorer not in UNGRADED:
        graded = grade_set(part, records, [answer.text for answer in answers])
        percent, parts, scores = graded.percent, graded.parts, graded.scores
    if distributed.is_main():
        rows = []
        for record, answer, value in zip(records, answers, scores, strict=True):
            row = {"id": record.id, "question": record.question, "answer": record.answer}
            row |= {"prediction": answer.text, "score": value}
            if answer.probability is not None:
                row |= {"probability": answer.probability, "second": answer.second}
            rows.append({**row, "cut": True} if answer.is_cut else row)
        files.write_json_lines(predictions, rows)
        rules = {"scorer": part.scorer, "prompt_suffix": part.prompt_suffix, "image_mode": part.image_mode}
        figures = {"percent": percent, "parts": dict(parts), **rules, **how}
        files.write_json(predictions.with_suffix(FIGURES), figures)
    return percent


def stored_figures(predictions: Path) -> dict[str, Any]:
    """Read what `write_graded` left beside a predictions file; empty where nothing is there."""
    path = predictions.with_suffix(FIGURES)
    return files.read_json(path, Figures) if files.is_there(path) else {}


def stored_rows(predictions: Path) -> list[dict[str, Any]]:
    """Read the rows of a predictions file; a UserError names the key of one that is not as it was written."""
    return files.read_json_lines(predictions, Row)


def stored_percent(predictions: Path, part: TestSet) -> float | None:
    """Read a set's score in percent from its predictions file; None where there is none, or it is not graded."""
    if not files.is_there(predictions):
        return None
    if part.scorer in SET_SCORERS:
        return stored_figures(predictions).get("percent")
    scores = [row["score"] for row in stored_rows(predictions)]
    return None if not scores or None in scores else 100.0 * sum(scores) / len(scores)


def errors_of(rows: Iterable[Mapping[str, Any]], part: TestSet) -> dict[str, int]:
    """Count the wrong answers by form; empty for a set that is not graded, or not answer by answer."""
    if part.scorer in SET_SCORERS:  # no caption is wholly right
        return {}
    wrong = (row for row in rows if row["score"] is not None and row["score"] < 1)
    found = (mistake(row["prediction"], row["answer"], row.get("cut", False), is_right=False) for row in wrong)
    return dict(Counter(found).most_common())


def strict_percent(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Give a second opinion beside the official rule: the share of answers that are the gold one word by word.

    Returns:
        In percent; None where gold answers are not known.
    """
    if any(row["answer"] is None for row in rows):
        return None
    hits = 0.0
    for row in rows:
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        hits += max(score("strict", prediction=row["prediction"], answer=gold) for gold in golds)
    return 100.0 * hits / len(rows)


def answer_paths(predictions: Path) -> list[Path]:
    """Name the files of a set's answers: predictions, figures, what to hand in elsewhere."""
    return [predictions, predictions.with_suffix(FIGURES), predictions.with_suffix(SUBMISSION)]


def answer_files(predictions: Path) -> list[Path]:
    """List what there is of a set's answers."""
    return [path for path in answer_paths(predictions) if path.is_file()]


def answers_to(rows: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> bool:
    """Tell whether rows of a predictions file answer these questions, in their order."""
    return [(row["id"], row["question"]) for row in rows] == [(record.id, record.question) for record in records]


def regrade(predictions: Path, part: TestSet, records: Sequence[Record]) -> float | None:
    """Grade stored answers again, by the rule that the set has now; no model is needed.

    Raises:
        ValueError: the stored answers are to other questions.
    """
    rows = stored_rows(predictions)
    if not answers_to(rows, records):
        raise ValueError(f"{predictions} answers other questions than the set has now")
    answers = [
        Answer(row["prediction"], row.get("cut", False), False, row.get("probability"), row.get("second"))
        for row in rows
    ]
    how = {key: value for key, value in stored_figures(predictions).items() if key in HOW}
    return write_graded(predictions, part, records, answers, how)
