"""Published folder layouts of classification data sets: what their classes are called, and which file shows which.

A layout is a function of the folder (or file) and the split; the folders are those that torchvision makes. Facts of
the layouts: torchvision's data sets, and `mtil/src/datasets` of Thunderbeee/ZSCL for the 80/20 splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_keeplora.data.layouts import folders, labelled, packed
from mllm_keeplora.data.layouts.published import Published
from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.system import given

LAYOUTS: dict[str, Callable[[Path, str], Published]] = {
    "aircraft": labelled.aircraft,
    "caltech101": folders.caltech101,
    "cifar100": packed.cifar100,
    "coop": labelled.coop,
    "dtd": labelled.dtd,
    "eurosat": folders.eurosat,
    "flowers102": labelled.flowers102,
    "food101": labelled.food101,
    "mnist": packed.mnist,
    "oxford_pet": labelled.oxford_pet,
    "stanford_cars": labelled.stanford_cars,
    "sun397": folders.sun397,
}


def published(layout: str, path: Path, split: str) -> Published:
    """Open a published data set.

    Args:
        layout: a key of `LAYOUTS`.
        path: its folder, or the file that says what is where.
        split: train, validation or test.

    Raises:
        UserError: a file is missing or damaged, or the set has no such split.
    """
    found = LAYOUTS[layout](path, split)
    for label in found.labels:
        if given.half_character(label):
            raise UserError(
                f"{path}: half a character stands in {shortened(ascii(label))}, what layout {layout} calls a class"
            )
    return found


def published_rows(layout: str, path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield class records as rows: `id`, `image` and `label`; pixels are encoded as PNG when their row is asked for."""
    found = None
    for index, (image, label) in enumerate(published(layout, path, split).rows):
        found = index
        if isinstance(image, str):
            yield {"id": image, "image": image, "label": label}
        else:
            yield {"id": f"{split}/{index}", "image": {"bytes": packed.as_png(image)}, "label": label}
    if found is None:
        raise UserError(f"{path}: no {split} picture is there, as layout {layout} looks for it")


def published_digest(layout: str, path: Path, split: str) -> str:
    """Digest what the rows of a split say (SHA-256): names of files, or pixels, and labels."""
    total = hashlib.sha256()
    for image, label in published(layout, path, split).rows:
        total.update(image.encode("utf-8", "surrogatepass") if isinstance(image, str) else image.tobytes())
        total.update(b"\0" + label.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()
