"""Gold answers that a benchmark keeps beside its questions: COCO captions, and the human answers of VQA and TextVQA."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_keeplora.data.schema import Record
from mllm_keeplora.errors import UserError, several


def with_references(records: Iterable[Record], path: Path) -> list[Record]:
    """Records with the gold answers that a reference file gives them.

    Args:
        records: questions in the order of their file.
        path: COCO captions (`annotations` of `image_id` and `caption`; the image of line n has the number n, from 1),
            or answers by `question_id` (`annotations` of VQA, `data` of TextVQA).

    Raises:
        UserError: the file is absent or of another shape, or has no answer for some record; all are told.
    """
    found, by_line = _read(path)
    answered, faults = [], []
    for number, record in enumerate(records, start=1):
        answers = found.get(str(number) if by_line else record.id)
        if not answers:
            key = f"image_id {number}" if by_line else f"question_id {record.id}"
            faults.append(f"{record.origin}: {path} has no answer for {key}")
        else:
            answered.append(replace(record, answer=tuple(answers)))
    if faults:
        raise several(faults)
    return answered


def _read(path: Path) -> tuple[dict[str, list[str]], bool]:
    """Key -> gold answers, and whether the keys are line numbers of the question file."""
    if not path.is_file():
        raise UserError(f"reference file {path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"reference file {path} is not readable JSON: {error}") from None
    rows = values.get("annotations") or values.get("data") if isinstance(values, dict) else None
    found: dict[str, list[str]] = {}
    by_line = False
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"reference file {path} must hold a list under `annotations` or `data`")
    for row in rows:
        if "caption" in row and "image_id" in row:
            by_line = True
            found.setdefault(str(row["image_id"]), []).append(str(row["caption"]))
        elif "question_id" in row and isinstance(row.get("answers"), list):
            found[str(row["question_id"])] = [_text(answer) for answer in row["answers"]]
        else:
            raise UserError(
                f"reference file {path}: a row has `image_id` and `caption`, or `question_id` and `answers`; "
                f"got keys {sorted(row)}"
            )
    return found, by_line


def _text(answer: Any) -> str:
    return str(answer["answer"]) if isinstance(answer, dict) and "answer" in answer else str(answer)
