"""What a reader of a published layout gives, and what all of them need to read one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_keeplora.data.layouts import matlab
from mllm_keeplora.errors import UserError, first_line, known, shortened
from mllm_keeplora.system import given

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
SPLIT_SEED = 42  # of the data sets that MTIL splits itself
MOST_MAT = 1 << 24  # bytes of a MATLAB file, and of a variable that is compressed in it


@dataclass(frozen=True)
class Published:
    """What a split of a published data set holds.

    Attributes:
        labels: what its files call the classes, in their order.
        rows: for each picture its file below the folder, or its pixels (h, w) or (h, w, 3) uint8; and its label.
    """

    labels: Sequence[str]
    rows: Iterable[tuple[str | np.ndarray, str]]


def split_80_20(items: Sequence[T], split: str) -> list[T]:
    """Choose the items of a split as MTIL draws it: a seeded permutation, of which the first 80 % are for training.

    Source: Thunderbeee/ZSCL, `split_dataset`: `random_split` with a generator of seed 42, which takes `randperm(n)`.
    """
    import torch

    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    cut = int(0.8 * len(items))
    return [items[place] for place in named({"train": order[:cut], "test": order[cut:]}, split)]


def named(splits: Mapping[str, T], split: str) -> T:
    """Give what belongs to a split; a UserError if the data set has none of that name."""
    if split not in splits:
        raise UserError(f"this layout has no {split} split; known: {known(splits)}")
    return splits[split]


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text file that are not empty, without outer spaces."""
    try:
        yield from (line for each in given.as_text(given.read_bytes(path)).splitlines() if (line := each.strip()))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def json_of(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return given.from_json(given.read_bytes(path, given.MOST_REFERENCES))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {given.why(error)}") from None


def mat_of(path: Path, key: str) -> list[Any]:
    """Read one variable of a MATLAB file (version 5) as a list, as `matlab.variable` gives it."""
    data = given.read_bytes(path, MOST_MAT)
    try:
        return matlab.variable(data, key, MOST_MAT)
    except KeyError:
        raise UserError(f"{path} has no variable {key}") from None
    except (ValueError, struct.error, zlib.error, RecursionError) as error:
        raise UserError(f"{path} is not a readable MATLAB file: {shortened(first_line(error))}") from None


def subfolders(path: Path) -> list[str]:
    """Name the folders in a folder, sorted; a UserError if it is none."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    return sorted(each.name for each in path.iterdir() if each.is_dir())
