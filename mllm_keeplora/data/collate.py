"""Batches: decode images, render prompts, pad. The order of records is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def joined(first: Mapping[str, Any], second: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """Two batches of model inputs as one, the shorter conversations filled up on the right.

    Args:
        first, second: from the same collator; what has the shape of the tokens (b, t) is filled up, the rest
            (pictures) is put one after the other.
        pad: token id to fill up with; nothing of it is attended to or carries loss.

    Raises:
        ValueError: pictures of two shapes, which this base cannot take in one batch.
    """
    import torch
    from torch.nn.functional import pad as filled

    tokens = [first["input_ids"].shape, second["input_ids"].shape]
    longest = max(shape[1] for shape in tokens)
    values = {"input_ids": pad, "labels": -100}
    whole = {}
    for name in dict.fromkeys([*first, *second]):
        own = [(batch[name], shape) for batch, shape in zip((first, second), tokens, strict=True) if name in batch]
        parts = [
            filled(each, (0, longest - shape[1]), value=values.get(name, 0)) if each.shape == shape else each
            for each, shape in own
        ]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"{name} of shapes {[tuple(part.shape) for part in parts]} do not fit into one batch")
        whole[name] = torch.cat(parts)
    return whole


def batches(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    """Consecutive slices of at most `size` records."""
    for start in range(0, len(records), size):
        yield records[start : start + size]


def evenly_spaced(records: Sequence[Record], count: int) -> Sequence[Record]:
    """At most `count` records spread evenly over the whole list, in its order (as the KeepLoRA code samples)."""
    if count >= len(records):
        return records
    return Selection([records], (index * len(records) // count for index in range(count)))
