"""What a record is, inside: images and turns for training, a question and its answer for a test."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mllm_keeplora.data.classes import ClassList

IMAGE_MARK = "<image>"


@dataclass(frozen=True, slots=True)
class Media:
    """One picture or clip, decoded only when a batch needs it.

    Attributes:
        path: its file; of one that is kept inside a data file, the name it has there.
        folder: where `path` must lie, links followed; None where it may lie anywhere.
        data: the encoded picture or clip, where it is kept inside a data file.
        pad: pad it to a square before the processor sees it.
        start, end: seconds of a clip between which it is shown; None for its own ends.
    """

    type: Literal["image", "video"]
    path: Path
    folder: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    pad: bool = False
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `trained` False takes the loss off an answer."""

    role: Literal["system", "user", "assistant"]
    text: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation about images. A test record is one question; its gold `answer` is not a turn.

    Where all images come before the text of the first user turn, as LLaVA puts them, `turns` hold no image marks;
    otherwise a mark stands for each image, in order, at its place in the text.
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
        """The text of the first user turn, without image marks."""
        return without_marks(next(turn.text for turn in self.turns if turn.role == "user"))

    def question_answers(self) -> list[tuple[str, str]]:
        """Pair each user turn with the assistant turn that follows it."""
        talk = [turn for turn in self.turns if turn.role != "system"]
        return [(without_marks(user.text), answer.text) for user, answer in zip(talk[::2], talk[1::2], strict=False)]

    def first_exchange(self) -> Record:
        """Cut the record behind its first answer, with the images that it shows until then."""
        stop = next(position for position, turn in enumerate(self.turns) if turn.role == "assistant") + 1
        marks = [sum(turn.text.count(IMAGE_MARK) for turn in turns) for turns in (self.turns[:stop], self.turns)]
        media = self.media[: marks[0]] if marks[1] else self.media
        return replace(self, turns=(*self.turns[: stop - 1], replace(self.turns[stop - 1], trained=True)), media=media)


def without_marks(text: str) -> str:
    """Take the image marks out of a turn's text."""
    return text.replace(IMAGE_MARK, "").strip() if IMAGE_MARK in text else text
