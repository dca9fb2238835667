"""What a row names to be shown: pictures and clips, under any of the usual names, and the marks that stand for them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mllm_keeplora.data.schema import IMAGE_MARK, MARKS, VIDEO_MARK, Media, Turn, marks_in, without_marks
from mllm_keeplora.errors import shortened

# Names that pictures go by; `images` and `image` are the usual ones.
PICTURES = ("images", "image", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls",
            "img", "imgs", "img_path", "img_paths", "picture", "pictures")  # fmt: skip
CLIPS = ("videos", "video", "video_path", "video_paths", "video_file", "video_files", "video_name")
ENDINGS = r"\.(?:png|jpe?g|webp|bmp|gif|tiff?|jp2|avif|heic)"
CLIP_ENDINGS = r"\.(?:mp4|mkv|webm|mov|avi|m4v|mpe?g|flv|wmv|ogv|3gp)"
# A mark; a picture named in the text, as Qwen-VL does.
TAG = re.compile(rf"{IMAGE_MARK}|{VIDEO_MARK}|<img>(.*?)</img>", re.DOTALL)


class Fault(ValueError):
    """A sentence that says what is wrong with a row; the reader adds where it stands."""


def marked(text: str, named: list) -> str:
    """Put marks where pictures are named in a text; `named` gets them, and every mark that stands there."""

    def mark(found: re.Match) -> str:
        named.append(found[0] if found[1] is None else image_named(found[1].strip()))
        return found[0] if found[1] is None else IMAGE_MARK

    return TAG.sub(mark, text)


def in_order(inside: Sequence[Media | str], images: Sequence[Media], clips: Sequence[Media]) -> tuple[Media, ...]:
    """Put what is shown in the order of the marks: named at its place, or the next of the row's lists."""
    others = {IMAGE_MARK: iter(images), VIDEO_MARK: iter(clips)}
    placed = [next(others[each], None) if isinstance(each, str) else each for each in inside]
    return (*(media for media in placed if media is not None), *others[IMAGE_MARK], *others[VIDEO_MARK])


def marks_of(shown: Sequence[Media]) -> str:
    return "".join(IMAGE_MARK if media.type == "image" else VIDEO_MARK for media in shown)


def refuse_unlike_marks(turns: Sequence[Turn], shown: Sequence[Media]) -> None:
    """Refuse a conversation that does not have one mark for each picture and clip."""
    text = "".join(turn.text for turn in turns)
    advice = "" if marks_in(text) else "; `missing_marks: first` of the domain puts them in front of the first question"
    for kind, name, mark in (("image", "image", IMAGE_MARK), ("video", "clip", VIDEO_MARK)):
        marks, count = text.count(mark), sum(media.type == kind for media in shown)
        if marks != count:
            raise Fault(f"{marks} {mark} marks for {count} {name}s; each {name} needs one mark{advice}")


def images_of_row(row: dict) -> list[Media]:
    """Read the pictures that a row names beside its text, under any of the known names."""
    found = {key: row[key] for key in PICTURES if row.get(key) is not None and row[key] not in ("", [])}
    # Beside a usual name others are often the picture's address, a number or a mark: they matter if they are files.
    usual = next((key for key in ("images", "image") if key in found), None)
    found = {key: value for key, value in found.items() if usual in (None, key) or names_picture(value)}
    return _one_list(
        {
            key: [image_named(each) for each in (value if isinstance(value, list) else [value])]
            for key, value in found.items()
        },
        "pictures",
    )


def clips_of_row(row: dict) -> list[Media]:
    """Read the clips that a row names beside its text; a list within the list is a clip given as pictures."""
    found = {key: row[key] for key in CLIPS if row.get(key) is not None and row[key] not in ("", [], "[]")}
    return _one_list(
        {
            key: [clip_named(each, row) for each in (value if isinstance(value, list) else [value])]
            for key, value in found.items()
        },
        "clips",
    )


def _one_list(read: dict[str, list[Media]], what: str) -> list[Media]:
    """Give what is named under several names once."""
    names = [{media.path.name for media in listed} - {""} for listed in read.values()]
    if any(own != names[0] for own in names if own and names[0]):
        raise Fault(f"{' and '.join(read)} name different {what}; leave one of them")
    return next(iter(read.values()), [])


def image_named(value: Any) -> Media:
    """Read a path as it is given, or an encoded picture with its name, if it has one."""
    return _media("image", value)


def clip_named(value: Any, told: Mapping[str, Any]) -> Media:
    """Read a clip as `_image` reads a picture, or as a list of pictures; `told` may say which seconds are shown."""
    if isinstance(value, list):
        paths = tuple(_media("image", each).path for each in value)
        if not paths or Path() in paths:
            raise Fault(f"a clip that is given as pictures must be a list of paths, got {shortened(repr(value))}")
        return Media("video", paths[0], files=paths)
    told = value if isinstance(value, dict) and value.keys() & {"video_start", "video_end"} else told
    ends = [told.get(f"video_{name}") for name in ("start", "end")]
    if any(isinstance(each, bool) or not isinstance(each, int | float | None) for each in ends):
        raise Fault(f"video_start and video_end must be seconds, got {ends[0]!r} and {ends[1]!r}")
    start, end = (None if each is None else float(each) for each in ends)
    return replace(_media("video", value), start=start, end=end)


def _media(kind: Literal["image", "video"], value: Any) -> Media:
    one = "an image" if kind == "image" else "a video"
    if isinstance(value, bytes | bytearray):
        return Media(kind, Path(), data=bytes(value))
    if isinstance(value, dict) and value.get("bytes") is not None:
        if not isinstance(value["bytes"], bytes | bytearray):
            raise Fault(f"bytes of {one} must be bytes, got {type(value['bytes']).__name__}")
        return Media(kind, Path(value.get("path") or ""), data=bytes(value["bytes"]))
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    is_text = isinstance(value, str) and value and "\0" not in value
    if not is_text or (len(value) > 4096 and not value.startswith("data:")):
        told = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        raise Fault(f"{kind} must be a path or a list of paths, got {told}")
    if value.startswith("data:"):
        try:
            return Media(kind, Path(), data=base64.b64decode(value.partition(",")[2], validate=True))
        except (binascii.Error, ValueError):
            raise Fault(f"{one} is a data address that is not valid base64") from None
    if "://" in value and not value.startswith("file://"):
        raise Fault(f"{kind} {value!r} is an address on the net; download it and name the file")
    return Media(kind, Path(value.removeprefix("file://")))


def names_picture(value: Any, endings: str = ENDINGS) -> bool:
    if isinstance(value, list):
        return any(names_picture(each, endings) for each in value)
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, bytes) or (
        isinstance(value, str)
        and len(value) < 1024
        and "://" not in value
        and re.search(rf"{endings}\s*$", value, re.IGNORECASE) is not None
    )


def with_mark_first(turn: Turn) -> Turn:
    if turn.role != "user" or marks_in(turn.text) != 1:
        return turn
    return replace(turn, text=MARKS.search(turn.text)[0] + without_marks(turn.text))


def without_leading_marks(turns: list[Turn]) -> tuple[Turn, ...]:
    """Take out the marks if all of them begin the first human turn; else leave them at their places."""
    first = next(position for position, turn in enumerate(turns) if turn.role == "user")
    text = turns[first].text
    begin = "".join(text.split()).startswith("".join(MARKS.findall(text)))
    if not begin or any(marks_in(turn.text) for turn in turns[first + 1 :]):
        return tuple(turns)
    return (*turns[:first], replace(turns[first], text=without_marks(text)), *turns[first + 1 :])
