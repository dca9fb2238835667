"""What a record is, inside: pictures, clips and turns for training, a question and its answer for a test."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.media.sampling import VideoOptions

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


@dataclass(frozen=True, slots=True)
class Media:
    """One picture or clip, decoded only when a batch needs it.

    Attributes:
        path: its file; of one that is kept inside a data file, the name it has there.
        folder: where `path` must lie, links followed; None where it may lie anywhere.
        data: the encoded picture or clip, where it is kept inside a data file.
        pad: pad it to a square before the processor sees it.
        start, end: seconds of a clip between which it is shown; None for its own ends.
        files: of a clip that is given as pictures, theirs in order; `path` is then the first.
        video: how the frames of a clip are chosen.
        frame: which of the frames seen is meant, where a clip is shown as pictures.
    """

    type: Literal["image", "video"]
    path: Path
    folder: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    pad: bool = False
    start: float | None = None
    end: float | None = None
    files: tuple[Path, ...] = ()
    video: VideoOptions | None = None
    frame: int | None = None

    @property
    def is_clip(self) -> bool:
        """Whether it is a clip as a whole, none of its frames."""
        return self.type == "video" and self.frame is None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `trained` False takes the loss off an answer."""

    role: Literal["system", "user", "assistant"]
    text: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation about pictures and clips. A test record is one question; its gold `answer` is not a turn.

    Where all of them come before the text of the first user turn, as LLaVA puts them, `turns` hold no marks; otherwise
    a mark stands for each, in order, at its place in the text.
    """

    id: str
    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    answer: str | tuple[str, ...] | None = None  # several where any of them is right
    kind: str = ""  # question type, where a test record names one
    origin: str = field(default="", compare=False)
    classes: ClassList | None = field(default=None, compare=False, repr=False)  # that the answer is one of

    def untrained(self) -> Record:
        """Take the loss off every answer: such a conversation fills a batch up."""
        return replace(self, turns=tuple(replace(turn, trained=False) for turn in self.turns))

    @property
    def question(self) -> str:
        """The text of the first user turn, without marks."""
        return without_marks(next(turn.text for turn in self.turns if turn.role == "user"))

    def question_answers(self) -> list[tuple[str, str]]:
        """Pair each user turn with the assistant turn that follows it."""
        talk = [turn for turn in self.turns if turn.role != "system"]
        return [(without_marks(user.text), answer.text) for user, answer in zip(talk[::2], talk[1::2], strict=False)]

    def first_exchange(self) -> Record:
        """Cut the record behind its first answer, with what it shows until then."""
        stop = next(position for position, turn in enumerate(self.turns) if turn.role == "assistant") + 1
        marks = [sum(marks_in(turn.text) for turn in turns) for turns in (self.turns[:stop], self.turns)]
        media = self.media[: marks[0]] if marks[1] else self.media
        return replace(self, turns=(*self.turns[: stop - 1], replace(self.turns[stop - 1], trained=True)), media=media)

    def as_pictures(self) -> Record:
        """Show each clip as the pictures that are seen of it, at its place in the text."""
        if not any(media.is_clip for media in self.media):
            return self
        counts = [media.video.frames if media.is_clip else 1 for media in self.media]
        shown = [
            replace(media, frame=frame) if media.is_clip else media
            for media, count in zip(self.media, counts, strict=True)
            for frame in range(count)
        ]
        left = iter(counts)
        turns = [
            replace(turn, text=MARKS.sub(lambda _: IMAGE_MARK * next(left), turn.text)) if turn.role == "user" else turn
            for turn in self.turns
        ]
        return replace(self, media=tuple(shown), turns=tuple(turns))


def marks_in(text: str) -> int:
    """Count the marks of pictures and clips in a text."""
    return text.count(IMAGE_MARK) + text.count(VIDEO_MARK)


def without_marks(text: str) -> str:
    """Take the marks out of a turn's text."""
    return MARKS.sub("", text).strip() if MARKS.search(text) else text
