"""Records of a large data file, and choices of records: each is made when it is asked for.

They lie in an Arrow file that is mapped into memory, so that a million of them take no more than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.schema import Record
from mllm_keeplora.system import files

VERSION = 5  # of the stored form; another one is made anew
BATCH = 1000  # rows written at once
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")  # in the order in which CL-VISTA's own script tries them
WAITING = 1 << 26  # bytes of pictures that wait to be written, at most


@dataclass(frozen=True)
class Source:
    """A data file, the folder that its image paths are relative to, and what else all of its records share.

    Attributes:
        pad: pictures are padded to squares.
        classes: that answers are one of, where the domain has such a list.
        video: how frames of clips are chosen.
    """

    path: Path
    images: Path
    pad: bool = False
    classes: ClassList | None = None
    video: VideoOptions = field(default_factory=VideoOptions)

    def placed(self, record: Record, index: int, pictures: Iterable[bytes | None]) -> Record:
        """Add to a record its place in the file, and where its pictures are.

        Args:
            record: as its row tells it.
            index: of the row, from 0.
            pictures: for each picture or clip the encoded one; None for a file in the folder.
        """
        media = []
        for named, picture in zip(record.media, pictures, strict=True):
            path, folder = self.images / named.path, self.images
            if picture is not None:
                path, folder = named.path if named.path.name else Path(f"{self.path.name}#{index}"), None
            elif named.type == "video" and not named.files:
                path = with_suffix(path)
            files = tuple(self.images / each for each in named.files)
            own = {"pad": self.pad} if named.type == "image" else {"video": self.video}
            media.append(replace(named, path=path, folder=folder, data=picture, files=files, **own))
        return replace(record, media=tuple(media), origin=f"{self.path} record {index}", classes=self.classes)


def with_suffix(path: Path) -> Path:
    """Find the file that a clip's name without its suffix means, as CL-VISTA's questions write it; else the name."""
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return path
    return next((each for each in (path.with_name(path.name + end) for end in SUFFIXES) if each.is_file()), path)


class StoredRecords(Sequence[Record]):
    """The records of a large data file by index, in its order.

    Args:
        arrow: from `write_records`.
        source: the data file that they come from.
    """

    def __init__(self, arrow: Path, source: Source):
        from datasets import Dataset

        self._rows, self._source = Dataset.from_file(str(arrow)), source

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        return map(self._record, range(len(self)), self._rows)

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        place = range(len(self))[index]
        return Selection(self, place) if isinstance(place, range) else self._record(place, self._rows[place])

    def _record(self, index: int, row: dict[str, Any]) -> Record:
        return self._source.placed(_as_json().validate_json(row["record"]), index, row["pictures"])


class Selection(Sequence[Record]):
    """A choice of records, in a given order and as often as they are named; each is made when it is asked for."""

    def __init__(self, records: Sequence[Record], places: Sequence[int]):
        self._records, self._places = records, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        places = self._places[index]
        return Selection(self._records, places) if isinstance(index, slice) else self._records[places]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Fill an Arrow file with records that are not yet placed; it is there whole, or not at all."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"record": Value("large_string"), "pictures": List(Value("large_binary"))})
    apart = {"media": {"__all__": {"data"}}, "classes": True}

    def write(temporary: Path) -> None:
        with ArrowWriter(features=features, path=str(temporary), writer_batch_size=BATCH) as writer:
            waiting = 0
            for record in records:
                told = _as_json().dump_json(record, exclude=apart, exclude_defaults=True).decode()
                pictures = [media.data for media in record.media]
                writer.write({"record": told, "pictures": pictures})
                waiting += sum(map(len, filter(None, pictures)))
                if waiting > WAITING:
                    writer.write_examples_on_file()
                    waiting = 0
            writer.finalize()

    files.write_atomically(path, write)


@cache
def _as_json() -> TypeAdapter[Record]:
    return TypeAdapter(Record)
