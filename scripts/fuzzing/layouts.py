"""Files of published data sets, in the folders that torchvision makes: lists, pickles, MATLAB and idx files, names."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

from fuzzing.samples import Target, encoded

CLASSES = ["banded", "dotted"]
FILES = {  # layout -> kinds of mutations by file
    "aircraft": {"variants.txt": "words", "images_variant_train.txt": "words"},
    "cifar100": {"meta": "pickle", "train": "pickle"},
    "coop": {"split_zhou_Own.json": "json"},
    "dtd": {"labels/train1.txt": "words"},
    "flowers102": {"imagelabels.mat": "header", "setid.mat": "header"},
    "food101": {"meta/train.json": "json"},
    "mnist": {"t10k-images-idx3-ubyte": "header", "train-images-idx3-ubyte.gz": "gzip",
              "train-labels-idx1-ubyte.gz": "gzip"},
    "oxford_pet": {"annotations/trainval.txt": "words"},
    "stanford_cars": {"devkit/cars_meta.mat": "header", "devkit/cars_train_annos.mat": "header"},
    "sun397": {"ClassName.txt": "words"},
}  # fmt: skip
OF_FOLDERS = {"caltech101": "101_ObjectCategories/", "eurosat": "", "sun397": "a/"}  # where names of folders matter


def layouts_of(home: Path) -> list[Target]:
    from mllm_keeplora.checks.classes import class_faults
    from mllm_keeplora.config import parse_config
    from mllm_keeplora.data import load_benchmark
    from mllm_keeplora.errors import several

    def read(layout: str, path: Path) -> None:
        part = {"layout": layout, "train": str(path), "test": str(path)}
        values = {"base": {"model": "tiny-clip"}, "strategy": {"name": "finetune"}, "output": str(home / "out")}
        config = parse_config({"name": "fuzzed", **values, "benchmark": {"domains": {"Own": part}}, "shots": 1}, "fuzz")
        benchmark = load_benchmark(config)
        faults = list(class_faults(benchmark, "Own"))
        benchmark.digest_of("Own", "train"), list(benchmark.train_records("Own")), list(benchmark.test_records("Own"))
        if faults:
            raise several(faults)

    def names(path: Path) -> None:
        """Read data sets whose folders are named by the lines of a file."""
        for layout, below in OF_FOLDERS.items():
            folder = home / "named_folders" / layout
            shutil.rmtree(folder, ignore_errors=True)
            for line in path.read_bytes().split(b"\n")[:20]:
                name = line.replace(b"/", b"").replace(b"\0", b"")[:255]
                if name not in (b"", b".", b".."):
                    picture = os.fsencode(folder / below) + b"/" + name + b"/image_0001.jpg"
                    os.makedirs(os.path.dirname(picture), exist_ok=True)
                    Path(os.fsdecode(picture)).touch()
                    Path(os.fsdecode(picture.replace(b"image_0001", b"sun_0001"))).touch()
            (folder / "ClassName.txt").write_bytes(
                b"".join(b"/a/%s\n" % each for each in path.read_bytes().splitlines())
            )
            read(layout, folder)

    found = []
    for layout, files in FILES.items():
        root = home / "layouts" / layout
        written(layout, root)
        for file, kind in files.items():
            given = root / file if layout == "coop" else root
            found.append(
                Target(
                    f"layout {layout}",
                    kind,
                    root / file,
                    (root / file).read_bytes(),
                    lambda _, of=(layout, given): read(*of),
                )
            )
    return [*found, Target("layout folders", "words", home / "folders.txt", b"banded\ndotted\nzig_zag\n", names)]


def written(layout: str, root: Path) -> None:
    """Write a miniature of a published data set: two classes, two pictures of each in each split."""
    import numpy as np
    from scipy.io import savemat

    def text(file: str, lines: list[str]) -> None:
        put(file, "".join(f"{line}\n" for line in lines).encode())

    def put(file: str, content: bytes) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)

    def mat(file: str, values: dict) -> None:
        told = io.BytesIO()
        savemat(told, values)
        put(file, told.getvalue())

    for split in ("train", "test"):
        pictures = [(f"{label}/{split}{n}", label) for label in CLASSES for n in range(2)]
        flat = [(name.replace("/", "_"), label) for name, label in pictures]
        if layout == "aircraft":
            text("variants.txt", CLASSES)
            text(f"images_variant_{split}.txt", [f"{name} {label}" for name, label in flat])
        elif layout == "cifar100":
            pixels = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072) % 251
            values = {"data": pixels.astype(np.uint8), "fine_labels": [0, 1, 0, 1], "filenames": ["a.png"] * 4}
            put(split, pickle.dumps(values, 4))
            put("meta", pickle.dumps({"fine_label_names": CLASSES, "coarse_label_names": ["x"]}, 2))
        elif layout == "dtd":
            text(f"labels/{split}1.txt", [f"{name}.jpg" for name, _ in pictures])
        elif layout == "food101":
            put(f"meta/{split}.json", json.dumps({label: [f"{label}/{split}0"] for label in CLASSES}).encode())
        elif layout == "mnist":
            labels = np.arange(10, dtype=np.uint8)
            for kind, values in (("images-idx3", np.zeros((10, 28, 28), np.uint8)), ("labels-idx1", labels)):
                data = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()
                packed = split == "train"
                file = f"{'train' if packed else 't10k'}-{kind}-ubyte{'.gz' if packed else ''}"
                put(file, gzip.compress(data, mtime=0) if packed else data)
        elif layout == "oxford_pet":
            numbered = [f"{name} {1 + CLASSES.index(label)} 1 1" for name, label in flat]
            text(f"annotations/{'trainval' if split == 'train' else split}.txt", numbered)
        elif layout == "stanford_cars":
            mat("devkit/cars_meta.mat", {"class_names": np.array(CLASSES, dtype=object)})
            file = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
            rows = [(1, 1 + n % 2, f"{n:05d}.jpg") for n in range(4)]
            kinds = [("bbox_x1", object), ("class", object), ("fname", object)]
            mat(file, {"annotations": np.array(rows, dtype=kinds)})
    if layout == "flowers102":
        mat("imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 2]]})
        mat("setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    elif layout == "sun397":
        text("ClassName.txt", [f"/{label[0]}/{label}" for label in CLASSES])
        for label in CLASSES:
            for n in range(5):
                put(f"{label[0]}/{label}/sun_{n}.jpg", encoded((8, 8), "JPEG"))
    elif layout == "coop":
        rows = {
            part: [[f"{label}/{part}.jpg", n, label] for n, label in enumerate(CLASSES)]
            for part in ("train", "val", "test")
        }
        put("split_zhou_Own.json", json.dumps(rows).encode())
