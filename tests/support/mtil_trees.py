"""Miniatures of MTIL's eleven data sets in their published folders: a few small pictures of each class."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_keeplora.config import find_config

TEXTURES = ["banded", "dotted", "zigzagged"]
FOODS = ["apple_pie", "waffles"]
BREEDS = [("Abyssinian", 1), ("american_bulldog", 2), ("Bengal", 3)]
VARIANTS = ["707-320", "A300B4", "F/A-18"]
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
THINGS = ["apple", "aquarium_fish"]
SCENES = ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]


def classes_of(name: str) -> list[str]:
    """What published files call the classes of a set whose names are written by hand."""
    path = find_config("benchmarks", "mtil").parent / "mtil" / f"{name}.json"
    return json.loads(path.read_text())["labels"]


def write_aircraft(root: Path, each: int = 2) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    _text(data / "variants.txt", VARIANTS)
    for part, first in (("train", 0), ("val", 100), ("test", 200)):
        named = [(f"{first + i:07d}", VARIANTS[i % len(VARIANTS)]) for i in range(each * len(VARIANTS))]
        _text(data / f"images_variant_{part}.txt", [f"{name} {label}" for name, label in named])
        for name, _ in named:
            _picture(data / "images" / f"{name}.jpg")


def write_caltech101(root: Path, each: int = 6) -> None:
    for name in [*classes_of("caltech101"), "BACKGROUND_Google"]:
        for number in range(1, each + 1):
            _picture(root / "caltech101/101_ObjectCategories" / name / f"image_{number:04d}.jpg")


def write_cifar100(root: Path, each: int = 2) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    _pickled(folder / "meta", {"fine_label_names": THINGS, "coarse_label_names": ["x"]})
    for part in ("train", "test"):
        labels = [i % len(THINGS) for i in range(each * len(THINGS))]
        pixels = np.arange(len(labels) * 3072, dtype=np.int64).reshape(len(labels), 3072) % 251
        _pickled(folder / part, {"data": pixels.astype(np.uint8), "fine_labels": labels, "filenames": ["a.png"]})


def write_dtd(root: Path, each: int = 2) -> None:
    folder = root / "dtd/dtd"
    for part in ("train1", "val1", "test1"):
        lines = [f"{name}/{name}_{part}_{i}.jpg" for name in TEXTURES for i in range(each)]
        _text(folder / "labels" / f"{part}.txt", lines)
        for line in lines:
            _picture(folder / "images" / line)


def write_eurosat(root: Path, each: int = 3) -> None:
    for name in classes_of("eurosat"):
        for number in range(1, each + 1):
            _picture(root / "eurosat/2750" / name / f"{name}_{number}.jpg")


def write_flowers102(root: Path, each: int = 1) -> None:
    from scipy.io import savemat

    folder, count = root / "flowers-102", 102 * each
    folder.mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": [[1 + i % 102 for i in range(3 * count)]]})
    parts = {"trnid": 0, "valid": count, "tstid": 2 * count}
    savemat(folder / "setid.mat", {key: [list(range(first + 1, first + count + 1))] for key, first in parts.items()})
    for number in range(1, 3 * count + 1):
        _picture(folder / "jpg" / f"image_{number:05d}.jpg")


def write_food101(root: Path, each: int = 2) -> None:
    for part in ("train", "test"):
        names = {food: [f"{food}/{part}{i}" for i in range(each)] for food in FOODS}
        _json(root / "food-101/meta" / f"{part}.json", names)
        for name in (name for own in names.values() for name in own):
            _picture(root / "food-101/images" / f"{name}.jpg")


def write_mnist(root: Path, each: int = 2, packed: bool = True) -> None:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = np.arange(10 * each, dtype=np.uint8) % 10
        pixels = np.repeat(labels[:, None] * 25, 784, axis=1).reshape(-1, 28, 28).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
            data = header + values.tobytes()
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)


def write_oxford_pet(root: Path, each: int = 2) -> None:
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        named = [(f"{breed}_{part}{i}", number) for breed, number in BREEDS for i in range(each)]
        named = [(name.replace("trainval", "1").replace("test", "2"), number) for name, number in named]
        _text(folder / "annotations" / f"{part}.txt", [f"{name} {number} 1 1" for name, number in named])
        for name, _ in named:
            _picture(folder / "images" / f"{name}.jpg")


def write_stanford_cars(root: Path, each: int = 2) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(CARS, dtype=object)})
    kinds = [("bbox_x1", object), ("class", object), ("fname", object)]
    for part, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(1, 1 + i % len(CARS), f"{i:05d}.jpg") for i in range(each * len(CARS))]
        savemat(folder / path, {"annotations": np.array(rows, dtype=kinds)})
        for _, _, name in rows:
            _picture(folder / f"cars_{part}" / name)


def write_sun397(root: Path, each: int = 5) -> None:
    _text(root / "SUN397/ClassName.txt", SCENES)
    for scene in SCENES:
        for number in range(each):
            _picture(root / f"SUN397{scene}" / f"sun_{'ba'[number % 2]}{number}.jpg")


def write_coop(root: Path, folder: str, name: str, classes: Sequence[str], each: int = 2) -> None:
    """Write a split of CoOp's with its pictures."""
    parts = {}
    for part in ("train", "val", "test"):
        parts[part] = [[f"{label}/{part}{i}.jpg", n, label] for n, label in enumerate(classes) for i in range(each)]
        for path, _, _ in parts[part]:
            _picture(root / folder / path)
    _json(root / name, parts)


TREES: dict[str, tuple[Callable[[Path], None], dict[str, int]]] = {  # of a domain: what writes it, and its counts
    "Aircraft": (write_aircraft, {"classes": 3, "train": 6, "test": 6}),
    "Caltech101": (write_caltech101, {"classes": 101, "train": 484, "test": 122}),
    "CIFAR100": (write_cifar100, {"classes": 2, "train": 4, "test": 4}),
    "DTD": (write_dtd, {"classes": 3, "train": 6, "test": 6}),
    "EuroSAT": (write_eurosat, {"classes": 10, "train": 24, "test": 6}),
    "Flowers": (write_flowers102, {"classes": 102, "train": 102, "test": 102}),
    "Food": (write_food101, {"classes": 2, "train": 4, "test": 4}),
    "MNIST": (write_mnist, {"classes": 10, "train": 20, "test": 20}),
    "OxfordPet": (write_oxford_pet, {"classes": 3, "train": 6, "test": 6}),
    "StanfordCars": (write_stanford_cars, {"classes": 3, "train": 6, "test": 6}),
    "SUN397": (write_sun397, {"classes": 3, "train": 12, "test": 3}),
}


def write_mtil(root: Path, names: Iterable[str] = TREES) -> dict[str, Any]:
    """Write the trees of some domains; gives the benchmark of a run over them, with their counts."""
    for name in names:
        TREES[name][0](root)
    return {"from": "mtil", "domains": {name: {"counts": TREES[name][1]} for name in names}}


def _picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(path.as_posix().encode()[-7:-4])
    Image.new("RGB", (8, 8), colour).save(path, "JPEG")


def _text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _pickled(path: Path, values: Any) -> None:
    path.write_bytes(pickle.dumps(values, protocol=2 if "data" not in values else 4))
