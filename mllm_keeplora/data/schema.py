"""What a record is, inside: images and turns for training, a question and its answer for a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Media:
    """One picture (video later), by path; decoded only when a batch needs it."""

    type: Literal["image"]
    path: Path


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation about images. A test record is one question; its gold `answer` is not a turn.

    `turns` hold no image marks: the images come before the text of the first user turn, as LLaVA puts them.
    """

    id: str
    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    answer: str | None = None
    kind: str = ""  # question type, where a test record names one
    origin: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        return self.turns[0].text

    def question_answers(self) -> list[tuple[str, str]]:
        """Pairs of a user turn and the assistant turn that follows it."""
        pairs = zip(self.turns[::2], self.turns[1::2], strict=False)
        return [(user.text, assistant.text) for user, assistant in pairs]
