"""The shapes that records come in, told apart by their keys, and what each says: images, turns, answer.

LLaVA, LLaMA-Factory (sharegpt, alpaca), ms-swift, Hugging Face `messages` with `images`, and the benchmarks' test
records. Pure: one row in, one record out; files and folders are the readers' business.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mllm_keeplora.data.named import (
    CLIP_ENDINGS,
    ENDINGS,
    Fault,
    clip_named,
    clips_of_row,
    image_named,
    images_of_row,
    in_order,
    marked,
    marks_of,
    names_picture,
    refuse_unlike_marks,
    with_mark_first,
    without_leading_marks,
)
from mllm_keeplora.data.naming import Naming
from mllm_keeplora.data.schema import IMAGE_MARK, MARKS, VIDEO_MARK, Media, Record, Turn, marks_in
from mllm_keeplora.system import given

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = (
    "`conversations` (LLaVA, sharegpt), `messages` (ms-swift, Hugging Face), `instruction` + `output` (alpaca), "
    "`query` + `response` (ms-swift), `conversation` (ms-swift's sharegpt), `prompt` + `completion`, "
    "`question` + `answer` (a table), `text` + `answer` (test record)"
)
DEFAULT_TAGS = {"user": "human", "assistant": "gpt", "system": "system"}  # of a LLaMA-Factory `dataset_info.json`
OTHERS = ("audio", "audios", "objects", "tools")  # what records may show besides
TOOL_ROLES = {"tool", "function", "function_call", "observation", "tool_call", "tool_response"}
OPTIONS = ("options", "choices", "candidates")  # names that the options of an answer go by; or one key for each letter
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")
# Values that are text, whatever they end in.
TEXTS = {"id", "question_id", "text", "question", "answer", "type", "task", "system", "instruction", "input", "output",
         "query", "response", "prompt", "completion", "history"}  # fmt: skip
LABEL = re.compile(r"^\(?[A-H][).:]\s+")  # of an option: "A. ", "(A) "


@dataclass(frozen=True)
class Layout:
    """Names that a LLaMA-Factory `dataset_info.json` gives to columns and tags; the defaults are its own.

    Attributes:
        formatting: sharegpt or alpaca; empty: told by the keys.
        told: where the names come from, for whoever cannot make sense of a record.
        missing_marks: what happens to a record that has pictures and no mark: refused, or they come first.
        naming: of a domain with classes: every row is then a picture and its class.
    """

    formatting: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    told: str = ""
    missing_marks: Literal["refuse", "first"] = "refuse"
    naming: Naming | None = None


BY_KEYS = Layout()
TALKS = ("conversations", "messages")
OTHER_SHAPES = ({"conversations"}, {"messages"}, {"conversation"}, {"instruction", "output"}, {"query", "response"},
                {"prompt", "completion"})  # fmt: skip


def train_record(row: Any, layout: Layout = BY_KEYS) -> Record:
    """Read a training conversation of any known shape; its pictures are named as in the row.

    Raises:
        Fault: an unknown shape, roles that do not alternate, no answer, marks and images that do not match.
    """
    if layout.naming is not None:
        record = class_record(row, layout.naming)
        return replace(record, turns=(*record.turns, Turn("assistant", record.answer)), answer=None)
    row = _canonical(_object(row), layout)
    turns, inside = _conversation(row)
    beside, clips = images_of_row(row), clips_of_row(row)
    if clips and not beside and inside == [IMAGE_MARK] * len(clips):  # some sets write the mark of an image for a clip
        turns = [replace(turn, text=turn.text.replace(IMAGE_MARK, VIDEO_MARK)) for turn in turns]
        inside = [VIDEO_MARK] * len(clips)
    images = in_order(inside, beside, clips)
    _refuse_what_would_be_dropped(row, turns, images)
    talk = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in talk]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) or "system" in [t.role for t in turns[1:]]:
        raise Fault(f"turns must alternate human, gpt and end with gpt, got {[turn.role for turn in turns]}")
    if any(not turn.text.strip() for turn in talk if turn.role == "assistant"):
        raise Fault("a gpt turn is empty; give the record an answer or leave it out")
    if not any(turn.trained for turn in talk if turn.role == "assistant"):
        raise Fault("no token is trained: every answer has its loss switched off")
    marks = sum(marks_in(turn.text) for turn in turns)
    if marks == 0 and images and layout.missing_marks == "first":
        first = next(position for position, turn in enumerate(turns) if turn.role == "user")
        turns[first] = replace(turns[first], text=marks_of(images) + turns[first].text)
    else:
        refuse_unlike_marks(turns, images)
    if any(marks_in(turn.text) for turn in turns if turn.role != "user"):
        mark = next(found[0] for turn in turns if turn.role != "user" and (found := MARKS.search(turn.text)))
        raise Fault(f"{mark} may stand in human turns only")
    # LLaVA puts an image in front of its turn, wherever its mark stood; several marks stay where they stand.
    if "conversations" in row and "images" not in row and "videos" not in row:
        turns = [with_mark_first(turn) for turn in turns]
    return Record(_identifier(row), images, without_leading_marks(turns))


def test_record(row: Any, layout: Layout = BY_KEYS, needs_answer: bool = True) -> Record:
    """Read a question with its gold answer: a benchmark's test record, or a conversation of one question and answer.

    Raises:
        Fault: no answer, no identifier, a mark where there is none to be, more than one question.
    """
    if layout.naming is not None:
        return class_record(row, layout.naming)
    row = _object(row)
    layout = replace(layout, missing_marks="first")  # as the pictures of a `text` record do
    kind = str(row.get("type", row.get("task", "")))  # `task` in CV-Bench
    is_table = not layout.formatting and "question" in row and not any(row.keys() >= shape for shape in OTHER_SHAPES)
    if is_table:
        row = {"text": row["question"], **row}
    if "text" not in row or any(key in row for key in TALKS):
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
    if (mark := MARKS.search(row["text"])) and not is_table:
        named_by = "the image is named by `image`" if mark[0] == IMAGE_MARK else "the clip is named by `video`"
        raise Fault(f"a test question carries no {mark[0]} mark; {named_by}")
    if not _identifier(row) and not is_table:  # rows of a table are known by their number
        raise Fault("question_id is missing")
    named: list = []
    asked = Turn("user", marked(row["text"], named))
    images, marks = in_order(named, images_of_row(row), clips_of_row(row)), marks_in(asked.text)
    _refuse_what_would_be_dropped(row, [asked], images)
    if marks not in (0, len(images)):
        shown = "pictures" if all(each.type == "image" for each in images) else "pictures and clips"
        raise Fault(f"{marks} {shown} have a place in the text, but {len(images)} are named; give all a place, or none")
    if answer is None and needs_answer:
        raise Fault(f"answer must be a str or a list of them, got None; keys are {sorted(row)}")
    return Record(_identifier(row), images, without_leading_marks([asked]), answer, kind)


test_record.__test__ = False  # not a test, whatever pytest thinks of the name


def question_record(row: Any, layout: Layout = BY_KEYS) -> Record:
    """Read as `test_record` does, but the gold answer may be kept elsewhere, or nowhere that can be read."""
    return test_record(row, layout, needs_answer=False)


def class_record(row: Any, naming: Naming) -> Record:
    """Read a picture and its class, `{id, image, label}`, as a question with its gold answer.

    Raises:
        Fault: no label, one that the list does not have, not exactly one picture.
    """
    row = _object(row)
    label, asked, images = row.get("label"), Turn("user", naming.question), images_of_row(row)
    if not isinstance(label, str):
        told = f"got {label!r}; keys are {sorted(row)}"
        raise Fault(f"label must be the name of a class, since the domain has a list, {told}")
    answer = naming.labels.get(label, label)
    if answer not in naming.classes.places:
        raise Fault(f"label {label!r} is none of the {len(naming.classes.names)} classes of the domain's list")
    _refuse_what_would_be_dropped(row, [asked], images)
    if len(images) != 1 or clips_of_row(row):
        clip = " and a clip" if clips_of_row(row) else ""
        raise Fault(f"a class record shows one picture, this one {len(images)}{clip}; keys are {sorted(row)}")
    return Record(_identifier(row), tuple(images), (asked,), answer)


def unwritable_text(record: Record) -> str:
    """Find half a character in what a record says."""
    answers = (record.answer,) if isinstance(record.answer, str) else record.answer or ()
    names = (str(media.path) for media in record.media)
    return given.half_character("".join((record.id, record.kind, *answers, *names, *(t.text for t in record.turns))))


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
    """Give the turns with marks for what they show, and for each mark what is named there, or else the mark."""
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
            turns += [Turn("user", marked(pair["human"], inside)), Turn("assistant", pair["assistant"])]
    elif "instruction" in row and "output" in row:
        asked = "\n".join(text for key in ("instruction", "input") if (text := _text(row, key)))
        turns = [*_past(row, inside), Turn("user", marked(asked, inside)), Turn("assistant", _text(row, "output"))]
    elif "query" in row and "response" in row:
        past, asked = _past(row, inside), marked(_text(row, "query"), inside)
        turns = [*past, Turn("user", asked), Turn("assistant", _text(row, "response"))]
    elif "prompt" in row and "completion" in row:
        turns = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            is_text = isinstance(row[key], str)
            text = marked(row[key], inside) if is_text and role == "user" else row[key]
            turns += [Turn(role, text)] if is_text else _turns(row, key, "role", "content", inside)
    elif "question" in row and "answer" in row:
        turns = [Turn("user", marked(_text(row, "question"), inside)), Turn("assistant", _text(row, "answer"))]
    else:
        raise Fault(f"unknown shape: keys are {sorted(row)}; a record has {SHAPES}")
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [Turn("system", row["system"]), *turns]
    return turns, inside


def _turns(row: dict, key: str, role_key: str, text_key: str, inside: list) -> list[Turn]:
    if not isinstance(row[key], list):
        raise Fault(f"{key} must be a list, got {row[key]!r}; keys are {sorted(row)}")
    return [_turn(turn, role_key, text_key, number, inside) for number, turn in enumerate(row[key])]


def _past(row: dict, inside: list) -> list[Turn]:
    """Read the earlier exchanges of an alpaca or ms-swift record: pairs of question and answer."""
    turns: list[Turn] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise Fault(f"history must hold pairs of question and answer, got {pair!r}")
        turns += [Turn("user", marked(pair[0], inside)), Turn("assistant", pair[1])]
    return turns


def _turn(turn: Any, role_key: str, text_key: str, number: int, inside: list) -> Turn:
    if isinstance(turn, dict) and role_key not in turn:  # the other pair of names
        role_key, text_key = ("role", "content") if role_key == "from" else ("from", "value")
    role = turn.get(role_key) if isinstance(turn, dict) else None
    content = turn.get(text_key) if isinstance(turn, dict) else None
    if isinstance(content, str) and role in ("human", "user"):
        content = marked(content, inside)
    if isinstance(content, list):
        content = "".join(_part(part, number, inside) for part in content)
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        allowed = "system|human|gpt" if role_key == "from" else "system|user|assistant"
        if isinstance(role, str) and role in TOOL_ROLES:
            raise Fault(f"turn {number} is of role {role!r}: calls of tools are not supported; allowed: {allowed}")
        raise Fault(f"turn {number} must be {{{role_key}: {allowed}, {text_key}: text}}, got {turn!r}")
    weights = [weight for weight in (turn.get("loss"), turn.get("loss_scale")) if weight is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise Fault(f"turn {number}: loss and loss_scale may be 0 or 1, got {weights[-1]!r}")
    return Turn(ROLES[role], content, all(weights))


def _part(part: Any, number: int, inside: list) -> str:
    """Give the text of one part of a turn; what it shows is a mark, and `inside` gets what is named or the mark."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return marked(part["text"], inside)
    if kind not in ("image", "image_url", "video", "video_url"):
        raise Fault(f"turn {number} has a part that is neither text, image nor video: {part!r}")
    keys = (kind,) if kind.endswith("_url") else (kind, "path", "url")
    own = next((part[key] for key in keys if part.get(key) is not None), None)
    mark = IMAGE_MARK if kind.startswith("image") else VIDEO_MARK
    if own is None and not kind.endswith("_url"):
        inside.append(mark)
    else:
        inside.append(image_named(own) if mark == IMAGE_MARK else clip_named(own, part))
    return mark


def _refuse_what_would_be_dropped(row: dict, turns: Sequence[Turn], images: Sequence[Media]) -> None:
    """Refuse a row that names something to be shown which is read neither as a picture nor as text."""
    for key in OTHERS:
        if row.get(key) and row[key] != "[]":
            raise Fault(f"{key} is not supported yet; allowed: images, videos")
    if not images:
        for key, value in row.items():
            for endings, found, name in ((ENDINGS, "picture", "image"), (CLIP_ENDINGS, "clip", "video")):
                if key not in TEXTS and names_picture(value, endings):
                    told = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
                    raise Fault(f"{key} names a {found}, {told}, that would not be shown; call it `{name}`")
    shown = _plain(" ".join(turn.text for turn in turns if turn.role != "assistant"))
    missing = [option for option in _options(row) if _plain(LABEL.sub("", option)) not in shown]
    if missing:
        raise Fault(
            f"option {missing[0]!r} is not in the question, so it would not be shown; write options into the text"
        )


def _options(row: dict) -> Iterator[str]:
    """Give the options of an answer that a row names, under any of the known names."""
    for key in OPTIONS:
        value = row.get(key)
        if isinstance(value, str) and value.strip().startswith("["):  # a list that a table keeps as text
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value.strip())
        if isinstance(value, str | list | tuple | dict):
            yield from _leaves(value)
    letters = [row.get(letter) for letter in LETTERS]
    if isinstance(letters[0], str) and isinstance(letters[1], str):
        yield from (each for each in letters if isinstance(each, str) and each.strip())


def _leaves(value: Any) -> Iterator[str]:
    """Give the texts and numbers of a nested value; of a text its lines."""
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    elif isinstance(value, str):
        yield from (line.strip() for line in value.splitlines() if line.strip())
    elif value is not None:
        yield str(value)


def _plain(text: str) -> str:
    """Give the letters and digits of a text, in lower case: what two ways of writing an option share."""
    return "".join(filter(str.isalnum, text)).casefold()


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise Fault(f"{key} must be text, got {value!r}")
    return value or ""


def _identifier(row: dict) -> str:
    return str(next((row[key] for key in ("question_id", "id") if row.get(key) is not None), ""))
