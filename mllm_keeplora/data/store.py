"""Records of one data file, built when they are asked for; their images are decoded later still.

Rows of a large file lie in an Arrow file that is mapped into memory, so that a million of them take no more than one.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from mllm_keeplora.data.formats import Draft
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.system import files

VERSION = 2  # of the stored form; another one is made anew
BATCH = 1000  # rows written at once
WAITING = 1 << 26  # bytes of pictures that wait to be written, at most


class LazyRecords(Sequence[Record]):
    """Records that are made when asked for; a slice is made no sooner."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Selection([self], range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._at(index % len(self))

    def _at(self, index: int) -> Record:
        raise NotImplementedError


class Records(LazyRecords):
    """Records by index, in the order of their file.

    Args:
        rows: from `rows_of` or `open_rows`.
        path: the data file that they come from, which their `origin` names.
        images: folder that image paths are relative to.
        pad: pictures are to be padded to squares.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], path: Path, images: Path, pad: bool = False):
        self.path, self.images, self.pad = path, images, pad
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        for index, row in enumerate(self._rows):
            yield self._record(index, row)

    def _at(self, index: int) -> Record:
        return self._record(index, self._rows[index])

    def _record(self, index: int, row: dict[str, Any]) -> Record:
        draft = json.loads(row["draft"])
        encoded = iter(row["pictures"])
        media = tuple(
            Media("image", Path(name or f"{self.path.name}#{index}"), data=next(encoded), pad=self.pad)
            if is_inside
            else Media("image", self.images / name, self.images, pad=self.pad)
            for name, is_inside in draft["images"]
        )
        answer = draft["answer"]
        return Record(
            id=draft["id"],
            media=media,
            turns=tuple(Turn(**turn) for turn in draft["turns"]),
            answer=tuple(answer) if isinstance(answer, list) else answer,
            kind=draft["kind"],
            origin=f"{self.path} record {index}",
        )


class Selection(LazyRecords):
    """Some records of several sequences, in a given order and as often as they are named.

    Args:
        sources: where the records are.
        places: position of each record, counted through all sources one after the other.
    """

    def __init__(self, sources: Sequence[Sequence[Record]], places: Iterable[int]):
        self._sources = sources
        self._starts = [0, *accumulate(map(len, sources))]
        self._places = places if isinstance(places, range) else array("q", places)

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, index: int) -> Record:
        place = self._places[index]
        number = bisect_right(self._starts, place) - 1
        return self._sources[number][place - self._starts[number]]


def rows_of(drafts: Iterable[Draft]) -> list[dict[str, Any]]:
    """Rows in memory: for files that are small anyway."""
    return [_row(draft) for draft in drafts]


def open_rows(path: Path) -> Sequence[dict[str, Any]]:
    """Rows of a file that `write_rows` made, mapped into memory."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def write_rows(path: Path, drafts: Iterable[Draft]) -> None:
    """Fill an Arrow file with drafts; it is there whole, or not at all."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"draft": Value("large_string"), "pictures": List(Value("large_binary"))})

    def write(temporary: Path) -> None:
        with ArrowWriter(features=features, path=str(temporary), writer_batch_size=BATCH) as writer:
            waiting = 0
            for draft in drafts:
                row = _row(draft)
                writer.write(row)
                waiting += sum(map(len, row["pictures"]))
                if waiting > WAITING:
                    writer.write_examples_on_file()
                    waiting = 0
            writer.finalize()

    files.write_atomically(path, write)


def _row(draft: Draft) -> dict[str, Any]:
    turns, images = list(map(vars, draft.turns)), [_name(image) for image in draft.images]
    values = {**vars(draft), "turns": turns, "images": images}  # not asdict: it copies every string, four times as slow
    pictures = [image[1] for image in draft.images if not isinstance(image, str)]
    return {"draft": json.dumps(values, ensure_ascii=False), "pictures": pictures}


def _name(image: str | tuple[str, bytes]) -> tuple[str, bool]:
    """Name of an image, and whether it is kept inside the data file."""
    return (image, False) if isinstance(image, str) else (image[0], True)
