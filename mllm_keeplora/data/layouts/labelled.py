"""Data sets whose pictures are named in files of labels, with splits of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mllm_keeplora.data.layouts.published import Published, json_of, lines_of, mat_of, named
from mllm_keeplora.errors import UserError, shortened


def aircraft(path: Path, split: str) -> Published:
    """Read FGVC-Aircraft at the level of variants: `train` (not trainval), `val`, `test`; CoOp leaves `data` out."""
    base = path / "data" if (path / "data").is_dir() else path
    file = named({"train": "train", "validation": "val", "test": "test"}, split)
    below = "data/images" if base != path else "images"

    def rows() -> Iterator[tuple[str, str]]:
        for line in lines_of(base / f"images_variant_{file}.txt"):
            name, _, label = line.partition(" ")
            yield f"{below}/{name}.jpg", label

    return Published(list(lines_of(base / "variants.txt")), rows())


def dtd(path: Path, split: str) -> Published:
    """Read DTD, partition 1; its classes are the folders that the lists of training and test name."""
    file = named({"train": "train1", "validation": "val1", "test": "test1"}, split)

    def rows(file: str) -> Iterator[tuple[str, str]]:
        for line in lines_of(path / "labels" / f"{file}.txt"):
            yield f"images/{line}", line.partition("/")[0]

    return Published(sorted({label for each in ("train1", "test1") for _, label in rows(each)}), rows(file))


def flowers102(path: Path, split: str) -> Published:
    """Read Flowers102; its classes are numbers from 1."""
    key = named({"train": "trnid", "validation": "valid", "test": "tstid"}, split)
    labels = _numbers(path / "imagelabels.mat", "labels")

    def rows() -> Iterator[tuple[str, str]]:
        for number in _numbers(path / "setid.mat", key):
            if not 1 <= number <= len(labels):
                raise UserError(f"{path / 'setid.mat'} names picture {number}; imagelabels.mat has {len(labels)}")
            yield f"jpg/image_{number:05d}.jpg", str(labels[number - 1])

    return Published([str(label) for label in sorted(set(labels))], rows())


def food101(path: Path, split: str) -> Published:
    """Read Food101; its classes are those that the lists of training and test name."""
    parts = {each: _food(path / "meta" / f"{each}.json") for each in ("train", "test")}
    rows = ((f"images/{name}.jpg", label) for label, names in named(parts, split).items() for name in names)
    return Published(sorted({label for part in parts.values() for label in part}), rows)


def oxford_pet(path: Path, split: str) -> Published:
    """Read the Oxford-IIIT Pets, `trainval` and `test`; a breed is called by the names of its files."""
    files = {"train": "trainval", "test": "test"}

    def rows(file: str) -> Iterator[tuple[str, str, str]]:
        for line in lines_of(path / "annotations" / f"{file}.txt"):
            name, number, *_ = (*line.split(), "")
            breed = " ".join(part.title() for part in name.rpartition("_")[0].split("_"))
            yield f"images/{name}.jpg", breed, number.zfill(4)

    numbered = sorted({(number, breed) for file in files.values() for _, breed, number in rows(file)})
    found = ((name, breed) for name, breed, _ in rows(named(files, split)))
    return Published([breed for _, breed in numbered], found)


def stanford_cars(path: Path, split: str) -> Published:
    """Read Stanford Cars with its development kit."""
    places = {"train": ("devkit/cars_train_annos.mat", "cars_train"),
              "test": ("cars_test_annos_withlabels.mat", "cars_test")}  # fmt: skip
    file, folder = named(places, split)
    labels = ["".join(map(str, name)) for name in mat_of(path / "devkit/cars_meta.mat", "class_names")]

    def rows() -> Iterator[tuple[str, str]]:
        for each in mat_of(path / file, "annotations"):
            match each:
                case {"class": [int() | float() as number], "fname": [str() as name]} if number % 1 == 0:
                    number = int(number)
                case _:
                    raise UserError(f"{path / file}: an annotation has no `class` and `fname`")
            if not 1 <= number <= len(labels):
                raise UserError(
                    f"{path / file}: {shortened(name)} is of class {number}; cars_meta.mat has {len(labels)}"
                )
            yield f"{folder}/{name}", labels[number - 1]

    return Published(labels, rows())


def coop(path: Path, split: str) -> Published:
    """Read a split of CoOp's, `split_zhou_*.json`: lists of path, number and name under train, val and test."""
    key = named({"train": "train", "validation": "val", "test": "test"}, split)
    values = json_of(path)
    if not isinstance(values, dict) or not all(isinstance(values.get(each), list) for each in ("train", "val", "test")):
        raise UserError(f"{path} must hold lists under train, val and test")
    for each in ("train", "val", "test"):
        for number, row in enumerate(values[each]):
            if not (isinstance(row, list) and list(map(type, row)) == [str, int, str]):
                told = shortened(repr(row))
                raise UserError(f"{path}: {each} row {number} must be [path, number, name], got {told}")
    numbered = sorted({(number, name) for each in ("train", "val", "test") for _, number, name in values[each]})
    return Published([name for _, name in numbered], ((name, label) for name, _, label in values[key]))


def _numbers(path: Path, key: str) -> list[int]:
    """Read whole numbers of a MATLAB file."""
    values = mat_of(path, key)
    if not all(isinstance(each, int | float) and each % 1 == 0 for each in values):  # nan and inf are none either
        raise UserError(f"{path}: {key} must hold whole numbers")
    return list(map(int, values))


def _food(path: Path) -> dict[str, list[str]]:
    values = json_of(path)
    lists = values.values() if isinstance(values, dict) else (None,)
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise UserError(f"{path} must map classes to lists of pictures")
    return values
