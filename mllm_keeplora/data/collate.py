"""Batches: decode images, render prompts, pad. The order of records is decided elsewhere."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_keeplora.data.schema import Record
from mllm_keeplora.data.store import Selection


def joined(first: Mapping[str, Any], second: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """Join two batches of model inputs, the shorter conversations filled up on the right.

    Args:
        first, second: from the same collator; what is told of each token (b, t, ...) is filled up, and zero where only
            one batch has it; the rest (pictures) is put one after the other, smaller ones filled up with zeros, as
            processors do within a batch.
        pad: token id to fill up with; nothing of it is attended to or carries loss.

    Raises:
        ValueError: an input of one batch has more dimensions than the other's, or clips another number of frames.
    """
    import torch
    from torch.nn.functional import pad as padded

    pairs = [(batch, batch["input_ids"].shape) for batch in (first, second)]
    longest = max(shape[1] for _, shape in pairs)
    fillings = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    whole = {}
    for name in dict.fromkeys([*first, *second]):
        given = first[name] if name in first else second[name]
        is_of_tokens = any(name in batch and batch[name].shape[:2] == shape for batch, shape in pairs)
        parts = []
        for batch, shape in pairs:
            if name not in batch and not is_of_tokens:
                continue
            values = batch[name] if name in batch else given.new_zeros(*shape, *given.shape[2:])
            if values.shape[:2] == shape:  # lengthened by a value, or by what is told of the last token
                more = values[:, -1:].expand(-1, longest - shape[1], *values.shape[2:])
                filling = fillings.get(name)
                values = torch.cat([values, more if filling is None else torch.full_like(more, filling)], dim=1)
            parts.append(values)
        if len({part.ndim for part in parts}) > 1:
            raise ValueError(f"{name} of shapes {[tuple(part.shape) for part in parts]} do not fit into one batch")
        if name == "pixel_values_videos" and len({part.shape[1] for part in parts if part.ndim > 2}) > 1:
            counts = " and ".join(str(part.shape[1]) for part in parts)  # black frames would be added
            raise ValueError(f"clips of {counts} frames do not fit into one batch; give `video.frames` one number")
        # Each further dimension is filled up with zeros at its end.
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        for number, part in enumerate(parts):
            gaps = [gap for size, now in zip(largest, part.shape[1:], strict=True) for gap in (size - now, 0)]
            parts[number] = padded(part, gaps[::-1])
        whole[name] = torch.cat(parts)
    return whole


def batches(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    """Cut records into consecutive slices of at most `size`."""
    for start in range(0, len(records), size):
        yield records[start : start + size]


def evenly_spaced(records: Sequence[Record], count: int) -> Sequence[Record]:
    """Choose at most `count` records, evenly over the whole list and in its order, from the first on."""
    if count >= len(records):
        return records
    return Selection(records, array("q", (index * len(records) // count for index in range(count))))


def spaced_between_ends(records: Sequence[Record], count: int) -> Sequence[Record]:
    """Choose `count` records, evenly from the first to the last and in their order; of one, the first.

    Places are rounded down from float32, as they are there.
    Source: extract_gradients.py of the KeepLoRA code.
    """
    import torch

    return Selection(records, array("q", torch.linspace(0, len(records) - 1, count).long().tolist()))
