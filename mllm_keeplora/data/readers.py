"""Read records: LLaVA JSON for training, the benchmarks' test records for grading. All faults of a file are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mllm_keeplora.data.schema import IMAGE_MARK, Media, Record, Turn
from mllm_keeplora.errors import UserError, several

ROLES = {"human": "user", "gpt": "assistant"}


def read_train(path: Path, images: Path) -> list[Record]:
    """Training records in LLaVA format: `image` and `conversations` of alternating `human` and `gpt` turns.

    Raises:
        UserError: every fault of the file at once, each with record index and what is wrong.
    """
    return _read(path, images, _train_record)


def read_test(path: Path, images: Path) -> list[Record]:
    """Test records: `question_id`, `image`, `text` (no image mark) and `answer`; ids are unique within the file."""
    records = _read(path, images, _test_record)
    seen: set[str] = set()
    doubled = [record for record in records if record.id in seen or seen.add(record.id)]
    if doubled:
        raise several([f"{record.origin}: question_id {record.id!r} occurs twice" for record in doubled])
    return records


def digest(path: Path) -> str:
    """SHA-256 of a data file, kept in the run so that changed data is noticed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path, images: Path, parse) -> list[Record]:
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} is not readable JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"data file {path} must hold one JSON array of records, got {type(rows).__name__}")
    if not rows:
        raise UserError(f"data file {path} is empty: it holds no record")
    records, faults = [], []
    for index, row in enumerate(rows):
        origin = f"{path} record {index}"
        try:
            records.append(parse(row, images, origin))
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise several(faults)
    return records


def _train_record(row: Any, images: Path, origin: str) -> Record:
    _require(row, {"conversations": list}, origin)
    turns = []
    for position, turn in enumerate(row["conversations"]):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
            raise UserError(f"{origin}: turn {position} must be {{from: human|gpt, value: text}}, got {turn!r}")
        turns.append(Turn(ROLES[turn["from"]], turn["value"]))
    roles = [turn.role for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{origin}: turns must alternate human, gpt and end with gpt, got {[r for r in roles]}")
    if any(not turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise UserError(f"{origin}: a gpt turn is empty")
    media = _media(row, images, origin)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(media):
        raise UserError(f"{origin}: {marks} {IMAGE_MARK} marks for {len(media)} images; each image needs one mark")
    if any(IMAGE_MARK in turn.text for turn in turns[1:]):
        raise UserError(f"{origin}: {IMAGE_MARK} may stand in the first human turn only")
    turns[0] = Turn("user", turns[0].text.replace(IMAGE_MARK, "").strip())
    return Record(_identifier(row), media, tuple(turns), origin=origin)


def _test_record(row: Any, images: Path, origin: str) -> Record:
    _require(row, {"text": str, "answer": str}, origin)
    if IMAGE_MARK in row["text"]:
        raise UserError(f"{origin}: a test question carries no {IMAGE_MARK} mark; the image is named by `image`")
    identifier = _identifier(row)
    if not identifier:
        raise UserError(f"{origin}: question_id is missing")
    media, kind = _media(row, images, origin), str(row.get("type", ""))
    return Record(identifier, media, (Turn("user", row["text"]),), row["answer"], kind, origin)


def _require(row: Any, keys: dict[str, type], origin: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{origin}: a record must be a JSON object, got {type(row).__name__}")
    for key, kind in keys.items():
        if not isinstance(row.get(key), kind):
            raise UserError(f"{origin}: {key} must be a {kind.__name__}, got {row.get(key)!r}; keys are {sorted(row)}")


def _identifier(row: dict) -> str:
    return str(row.get("question_id", row.get("id", "")))


def _media(row: dict, images: Path, origin: str) -> tuple[Media, ...]:
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{origin}: image must be a path or a list of paths, got {names!r}")
    return tuple(Media("image", _inside(images, name, origin)) for name in names)


def _inside(images: Path, name: str, origin: str) -> Path:
    """The image's path, which may not leave the data folder."""
    folder = images.resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise UserError(f"{origin}: image {name!r} leaves the data folder {images}")
    if not path.is_file():
        raise UserError(f"{origin}: image {name!r} does not exist in {images}")
    return path
