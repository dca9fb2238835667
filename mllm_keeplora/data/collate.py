"""Batches: decode images, render prompts, pad. The order of records is decided elsewhere."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_keeplora.data.schema import Record
from mllm_keeplora.data.store import Selection


def joined(first: Mapping[str, Any], second: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """Two batches of model inputs as one, the shorter conversations filled up on the right.

    Args:
        first, second: from the same collator; what is told of each token (b, t, ...) is filled up, and zero where only
            one batch has it; the rest (pictures) is put one after the other, smaller ones filled up with zeros, as
            processors do within a batch.
        pad: token id to fill up with; nothing of it is attended to or carries loss.

    Raises:
        ValueError: an input of one batch has more dimensions than the other's.
    """
    import torch

    tokens = [first["input_ids"].shape, second["input_ids"].shape]
    longest = max(shape[1] for shape in tokens)
    fillings = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    whole = {}
    for name in dict.fromkeys([*first, *second]):
        own = [(batch.get(name), shape) for batch, shape in zip((first, second), tokens, strict=True)]
        if any(each is not None and each.shape[:2] == shape for each, shape in own):
            given = next(each for each, _ in own if each is not None)
            own = [(given.new_zeros(*s, *given.shape[2:]) if each is None else each, s) for each, s in own]
        parts = [
            _lengthened(each, longest, fillings.get(name)) if each.shape[:2] == shape else each
            for each, shape in own
            if each is not None
        ]
        if len({part.ndim for part in parts}) > 1:
            raise ValueError(f"{name} of shapes {[tuple(part.shape) for part in parts]} do not fit into one batch")
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        whole[name] = torch.cat([_filled(part, largest) for part in parts])
    return whole


def _lengthened(values: Any, length: int, filling: int | None) -> Any:
    """(b, t, ...) to (b, length, ...): by a value, or by what is told of the last token."""
    import torch

    more = values[:, -1:].expand(-1, length - values.shape[1], *values.shape[2:])
    return torch.cat([values, more if filling is None else torch.full_like(more, filling)], dim=1)


def _filled(values: Any, sizes: Sequence[int]) -> Any:
    """(n, ...) filled up with zeros at the end of each further dimension."""
    from torch.nn.functional import pad

    gaps = [gap for size, now in zip(sizes, values.shape[1:], strict=True) for gap in (size - now, 0)]
    return pad(values, gaps[::-1])


def batches(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    """Consecutive slices of at most `size` records."""
    for start in range(0, len(records), size):
        yield records[start : start + size]


def evenly_spaced(records: Sequence[Record], count: int) -> Sequence[Record]:
    """At most `count` records spread evenly over the whole list, in its order (as the KeepLoRA code samples)."""
    if count >= len(records):
        return records
    return Selection(records, array("q", (index * len(records) // count for index in range(count))))
