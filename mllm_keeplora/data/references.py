"""Gold answers that a benchmark keeps beside its questions.

COCO captions, the human answers of VQA and TextVQA, and the answers of CL-VISTA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mllm_keeplora.data.schema import Record
from mllm_keeplora.errors import UserError, several, shortened
from mllm_keeplora.system import given


def with_references(records: Iterable[Record], path: Path) -> list[Record]:
    """Give records the gold answers of a reference file.

    Args:
        records: questions in the order of their file.
        path: COCO captions (`annotations` of `image_id` and `caption`; the image of line n has the number n, from 1),
            answers by `question_id` (`annotations` of VQA, `data` of TextVQA), or a list of `{answer}`, one for each
            question in its order (CL-VISTA).

    Raises:
        UserError: the file is absent or of another shape, or has no answer for some record; all are told.
    """
    if not path.exists():
        raise UserError(f"reference file {path} does not exist")
    data = given.read_bytes(path, given.MOST_REFERENCES)
    try:
        values = given.from_json(data)
    except ValueError as error:
        raise UserError(f"reference file {path} is not readable JSON: {error}") from None
    if isinstance(values, list):
        return _in_order(list(records), values, path)
    rows = values.get("annotations") or values.get("data") if isinstance(values, dict) else None
    found: dict[str, list[str]] = {}
    by_line = False
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"reference file {path} must hold a list of answers, or one under `annotations` or `data`")
    for row in rows:
        if "caption" in row and "image_id" in row:
            by_line = True
            found.setdefault(str(row["image_id"]), []).append(str(row["caption"]))
        elif "question_id" in row and isinstance(row.get("answers"), list):
            told = [each.get("answer", each) if isinstance(each, dict) else each for each in row["answers"]]
            found[str(row["question_id"])] = [str(each) for each in told]
        else:
            raise UserError(
                f"reference file {path}: a row has `image_id` and `caption`, or `question_id` and `answers`; "
                f"got keys {shortened(sorted(row))}"
            )
    # Answers that are numbered belong to the lines of the question file.
    answered, faults = [], []
    for number, record in enumerate(records, start=1):
        name, key = ("image_id", str(number)) if by_line else ("question_id", record.id)
        answered.append(replace(record, answer=tuple(found.get(key, ()))))
        if not answered[-1].answer:
            faults.append(f"{record.origin}: {path} has no answer for {name} {key}")
    if faults:
        raise several(faults)
    return answered


def _in_order(records: list[Record], rows: list, path: Path) -> list[Record]:
    """Give each record the answer of its place; a file of another length belongs to other questions."""
    if len(rows) != len(records):
        raise UserError(f"reference file {path} has {len(rows)} answers for {len(records)} questions; they go by place")
    faults = [
        f"{record.origin}: answer {place} of {path} must be {{answer: text}}, got {shortened(repr(row))}"
        for place, (record, row) in enumerate(zip(records, rows, strict=True))
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str)
    ]
    if faults:
        raise several(faults)
    return [replace(record, answer=row["answer"]) for record, row in zip(records, rows, strict=True)]
