"""The shapes that records come in, told apart by their keys, and what each says: images, turns, answer.

LLaVA, LLaMA-Factory (sharegpt, alpaca), ms-swift, Hugging Face `messages` with `images`, and the benchmarks' test
records. Pure: one row in, one record out; files and folders are the readers' business.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm_keeplora.data.schema import IMAGE_MARK, Media, Record, Turn, without_marks

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = (
    "`conversations` (LLaVA, sharegpt), `messages` (ms-swift, Hugging Face), `instruction` + `output` (alpaca), "
    "`query` + `response` (ms-swift), `conversation` (ms-swift's sharegpt), `prompt` + `completion`, "
    "`text` + `answer` (test record)"
)
DEFAULT_TAGS = {"user": "human", "assistant": "gpt", "system": "system"}  # of a LLaMA-Factory `dataset_info.json`
OTHER_MEDIA = ("video", "videos", "audio", "audios", "objects")


@dataclass(frozen=True)
class Layout:
    """Names that a LLaMA-Factory `dataset_info.json` gives to columns and tags; the defaults are its own."""

    formatting: str = ""  # sharegpt or alpaca; empty: told by the keys
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    told: str = ""  # where they come from, for whoever cannot make sense of a record


BY_KEYS = Layout()


class Fault(ValueError):
    """A sentence that says what is wrong with a row; the reader adds where it stands."""


def train_record(row: Any, layout: Layout = BY_KEYS) -> Record:
    """Read a training conversation of any known shape; its pictures are named as in the row.

    Raises:
        Fault: an unknown shape, roles that do not alternate, no answer, marks and images that do not match.
    """
    row = _canonical(_object(row), layout)
    turns, inside = _conversation(row)
    # In the order of their marks: images that stand in parts at their place, the others from the row's list.
    beside = iter(_images(row))
    placed = [next(beside, None) if image is None else image for image in inside]
    images = (*(image for image in placed if image is not None), *beside)
    _refuse_other_media(row)
    talk = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in talk]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) or "system" in [t.role for t in turns[1:]]:
        raise Fault(f"turns must alternate human, gpt and end with gpt, got {[turn.role for turn in turns]}")
    if any(not turn.text.strip() for turn in talk if turn.role == "assistant"):
        raise Fault("a gpt turn is empty; give the record an answer or leave it out")
    if not any(turn.trained for turn in talk if turn.role == "assistant"):
        raise Fault("no token is trained: every answer has its loss switched off")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise Fault(f"{marks} {IMAGE_MARK} marks for {len(images)} images; each image needs one mark")
    if any(IMAGE_MARK in turn.text for turn in turns if turn.role != "user"):
        raise Fault(f"{IMAGE_MARK} may stand in human turns only")
    moved = "conversations" in row and "images" not in row  # LLaVA puts the image first, wherever its mark stood
    return Record(_identifier(row), images, _with_images_first(turns, moved))


def test_record(row: Any, layout: Layout = BY_KEYS, needs_answer: bool = True) -> Record:
    """Read a question with its gold answer: a benchmark's test record, or a conversation of one question and answer.

    Raises:
        Fault: no answer, no identifier, a mark where there is none to be, more than one question.
    """
    row = _object(row)
    kind = str(row.get("type", row.get("task", "")))  # `task` in CV-Bench
    if "text" not in row or any(key in row for key in ("conversations", "messages")):
        record = train_record(row, layout)
        asked = tuple(turn for turn in record.turns if turn.role != "assistant")
        if len(record.turns) - len(asked) != 1:
            raise Fault(f"a test record asks one question, this one asks {len(record.turns) - len(asked)}")
        return replace(record, turns=asked, answer=record.turns[-1].text, kind=kind)
    if not isinstance(row["text"], str):
        raise Fault(f"text must be a str, got {row['text']!r}; keys are {sorted(row)}")
    answer = row.get("answer", row.get("answer_bbox"))
    if isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer):
        answer = tuple(answer)
    if not isinstance(answer, str | tuple | None):
        raise Fault(f"answer must be a str or a list of them, got {answer!r}; keys are {sorted(row)}")
    if IMAGE_MARK in row["text"]:
        raise Fault(f"a test question carries no {IMAGE_MARK} mark; the image is named by `image`")
    if not _identifier(row):
        raise Fault("question_id is missing")
    _refuse_other_media(row)
    images = tuple(_images(row))
    if answer is None and needs_answer:
        raise Fault(f"answer must be a str or a list of them, got None; keys are {sorted(row)}")
    return Record(_identifier(row), images, (Turn("user", row["text"]),), answer, kind)


test_record.__test__ = False  # not a test, whatever pytest thinks of the name


def question_record(row: Any, layout: Layout = BY_KEYS) -> Record:
    """Read as `test_record` does, but the gold answer may be kept elsewhere, or nowhere that can be read."""
    return test_record(row, layout, needs_answer=False)


def _object(row: Any) -> dict:
    if not isinstance(row, dict):
        raise Fault(f"a record must be a JSON object, got {type(row).__name__}")
    return row


def _canonical(row: dict, layout: Layout) -> dict:
    """Give a row its standard names, where a `dataset_info.json` gives it others."""
    if not layout.formatting:
        return row
    standard = {"prompt": "instruction", "query": "input", "response": "output"}
    if layout.formatting == "sharegpt":
        standard = {"messages": "conversations"}
    named = {standard.get(key, key): row[column] for key, column in layout.columns.items() if column in row}
    rest = {key: value for key, value in row.items() if key not in layout.columns.values()}
    found = {**rest, **named}
    if layout.formatting == "sharegpt" and isinstance(found.get("conversations"), list):
        found["conversations"] = [_retagged(turn, layout.tags) for turn in found["conversations"]]
    return found


def _retagged(turn: Any, tags: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    role = turn.get(tags.get("role_tag", "from"))
    names = {tags.get(f"{part}_tag", name): name for part, name in DEFAULT_TAGS.items()}
    return {
        "from": names.get(role, role) if isinstance(role, str) else role,
        "value": turn.get(tags.get("content_tag", "value")),
    }


def _conversation(row: dict) -> tuple[list[Turn], list]:
    """Give the turns with marks for their images, and the images that stand inside the turns."""
    inside: list = []
    if "conversations" in row:
        turns = _turns(row, "conversations", "from", "value", inside)
    elif "messages" in row:
        turns = _turns(row, "messages", "role", "content", inside)
    elif "conversation" in row:
        turns = []  # of ms-swift's sharegpt: a question and its answer in each entry
        for pair in row["conversation"] if isinstance(row["conversation"], list) else [row["conversation"]]:
            if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("human", "assistant")):
                raise Fault(f"conversation must hold {{human: text, assistant: text}}, got {pair!r}")
            turns += [Turn("user", pair["human"]), Turn("assistant", pair["assistant"])]
    elif "instruction" in row and "output" in row:
        asked = "\n".join(text for key in ("instruction", "input") if (text := _text(row, key)))
        turns = [*_past(row), Turn("user", asked), Turn("assistant", _text(row, "output"))]
    elif "query" in row and "response" in row:
        turns = [*_past(row), Turn("user", _text(row, "query")), Turn("assistant", _text(row, "response"))]
    elif "prompt" in row and "completion" in row:
        turns = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            is_text = isinstance(row[key], str)
            turns += [Turn(role, row[key])] if is_text else _turns(row, key, "role", "content", inside)
    else:
        raise Fault(f"unknown shape: keys are {sorted(row)}; a record has {SHAPES}")
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [Turn("system", row["system"]), *turns]
    return turns, inside


def _turns(row: dict, key: str, role_key: str, text_key: str, inside: list) -> list[Turn]:
    if not isinstance(row[key], list):
        raise Fault(f"{key} must be a list, got {row[key]!r}; keys are {sorted(row)}")
    return [_turn(turn, role_key, text_key, number, inside) for number, turn in enumerate(row[key])]


def _past(row: dict) -> list[Turn]:
    """Read the earlier exchanges of an alpaca or ms-swift record: pairs of question and answer."""
    turns: list[Turn] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise Fault(f"history must hold pairs of question and answer, got {pair!r}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _turn(turn: Any, role_key: str, text_key: str, number: int, inside: list) -> Turn:
    if isinstance(turn, dict) and role_key not in turn:  # the other pair of names
        role_key, text_key = ("role", "content") if role_key == "from" else ("from", "value")
    role = turn.get(role_key) if isinstance(turn, dict) else None
    content = turn.get(text_key) if isinstance(turn, dict) else None
    if isinstance(content, list):
        content = "".join(_part(part, number, inside) for part in content)
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        allowed = "system|human|gpt" if role_key == "from" else "system|user|assistant"
        raise Fault(f"turn {number} must be {{{role_key}: {allowed}, {text_key}: text}}, got {turn!r}")
    weights = [weight for weight in (turn.get("loss"), turn.get("loss_scale")) if weight is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise Fault(f"turn {number}: loss and loss_scale may be 0 or 1, got {weights[-1]!r}")
    return Turn(ROLES[role], content, all(weights))


def _part(part: Any, number: int, inside: list) -> str:
    """Give the text of one part of a turn; an image part is a mark, and `inside` gets its image or None."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise Fault(f"turn {number} has a part that is neither text nor image: {part!r}")
    keys = ("image", "path", "url") if kind == "image" else ("image_url",)
    own = next((part[key] for key in keys if part.get(key) is not None), None)
    inside.append(None if own is None and kind == "image" else _image(own))
    return IMAGE_MARK


def _images(row: dict) -> list[Media]:
    found = row.get("images") if row.get("images") is not None else row.get("image")
    if found is None or found == "":
        return []
    return [_image(each) for each in (found if isinstance(found, list) else [found])]


def _image(value: Any) -> Media:
    """Read a path as it is given, or an encoded picture with the name it has in its file, if any."""
    if isinstance(value, dict) and value.get("bytes") is not None:
        if not isinstance(value["bytes"], bytes | bytearray):
            raise Fault(f"bytes of an image must be bytes, got {type(value['bytes']).__name__}")
        return Media("image", Path(value.get("path") or ""), data=bytes(value["bytes"]))
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    is_text = isinstance(value, str) and value and "\0" not in value
    if not is_text or (len(value) > 4096 and not value.startswith("data:")):
        told = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        raise Fault(f"image must be a path or a list of paths, got {told}")
    if value.startswith("data:"):
        try:
            return Media("image", Path(), data=base64.b64decode(value.partition(",")[2], validate=True))
        except (binascii.Error, ValueError):
            raise Fault("an image is a data address that is not valid base64") from None
    if "://" in value and not value.startswith("file://"):
        raise Fault(f"image {value!r} is an address on the net; download it and name the file")
    return Media("image", Path(value.removeprefix("file://")))


def _refuse_other_media(row: dict) -> None:
    for key in OTHER_MEDIA:
        if row.get(key):
            raise Fault(f"{key} is not supported yet; allowed: images")


def _with_images_first(turns: list[Turn], moved: bool) -> tuple[Turn, ...]:
    """Take out marks that all begin the first human turn, or are moved there; leave others at their places."""
    first = next(position for position, turn in enumerate(turns) if turn.role == "user")
    text = turns[first].text
    begin = "".join(text.split()).startswith(IMAGE_MARK * text.count(IMAGE_MARK))
    if not (begin or moved) or any(IMAGE_MARK in turn.text for turn in turns[first + 1 :]):
        return tuple(turns)
    return (*turns[:first], Turn("user", without_marks(text)), *turns[first + 1 :])


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise Fault(f"{key} must be text, got {value!r}")
    return value or ""


def _identifier(row: dict) -> str:
    return str(next((row[key] for key in ("question_id", "id") if row.get(key) is not None), ""))
