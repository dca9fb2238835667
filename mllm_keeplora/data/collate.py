"""Batches: decode images, render prompts, pad. The order of records is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_keeplora.data.images import images_of
from mllm_keeplora.data.schema import Record
from mllm_keeplora.data.store import Selection


@dataclass(frozen=True)
class TrainCollator:
    """Turns a list of records into model inputs with labels; `prompt` is a `models.prompt.ChatPrompt`."""

    prompt: Any
    max_length: int | None = None

    def __call__(self, records: Sequence[Record]) -> dict:
        images = [images_of(record, self.prompt.background) for record in records]
        return self.prompt.training_batch(records, images, self.max_length)


def batches(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    """Consecutive slices of at most `size` records."""
    for start in range(0, len(records), size):
        yield records[start : start + size]


def evenly_spaced(records: Sequence[Record], count: int) -> Sequence[Record]:
    """At most `count` records spread evenly over the whole list, in its order (as the KeepLoRA code samples)."""
    if count >= len(records):
        return records
    return Selection([records], (index * len(records) // count for index in range(count)))
