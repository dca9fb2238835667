"""The pictures of `mini_mtil`: what ships is unpacked once into the cache, what may not ship comes from a package."""

from __future__ import annotations

import hashlib
import json
import tarfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .cache import Progress, cached

ARCHIVE = "assets/mini_mtil/pictures.tar.gz"
CELLS = {0.0: "no defect", 1 / 3: "a doubtful defect", 2 / 3: "a likely defect", 1.0: "a certain defect"}
CELL_SPLITS = {"train": 900, "validation": 300, "test": 400}
SIZE, SEED = 48, 41


def ensure_mini_mtil(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Find the folder of `mini_mtil`; what ships is unpacked first if it is not there yet.

    Args:
        cache_dir: as in `cached`.
        progress: called with (files done, files in total); not called if the folder exists.
    """
    return cached(f"mini_mtil-{_digest()[:12]}", lambda folder: _unpack(folder, progress), cache_dir)


def ensure_mini_mtil_cells(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Find the folder of `mini_mtil_cells`: all of `mini_mtil`, and solar cells of the package elpv-dataset.

    Raises:
        ModuleNotFoundError: the package is not installed; its licence (CC BY-NC-SA 4.0) lets us use it, not ship it.
    """

    def write(folder: Path) -> None:
        _unpack(folder, progress)
        _write_cells(folder / "Cells")

    if find_spec("elpv_dataset") is None:
        raise ModuleNotFoundError(
            "domain Cells needs the package elpv-dataset, which is not installed: "
            "pip install 'mllm-keeplora[mini-mtil]'; benchmark mini_mtil does without"
        )
    return cached(f"mini_mtil_cells-{_digest()[:12]}", write, cache_dir)


def _digest() -> str:
    return hashlib.sha256(_archive().read_bytes()).hexdigest()


def _archive() -> Path:
    return Path(str(resources.files("mllm_keeplora"))) / ARCHIVE


def _unpack(folder: Path, progress: Progress | None) -> None:
    with tarfile.open(_archive()) as archive:
        entries = archive.getmembers()
        for done, entry in enumerate(entries, 1):
            path = folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(entry).read())
            if progress is not None:
                progress(done, len(entries))


def _write_cells(folder: Path) -> None:
    """Write photographs of solar cells with what experts said of them, chosen at random."""
    from elpv_dataset.utils import load_dataset

    images, shares, _ = load_dataset()
    order = np.random.default_rng((SEED, 8)).permutation(len(images))
    (folder / "images").mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps(list(CELLS.values())))
    for split, count in CELL_SPLITS.items():
        rows = []
        for number, place in enumerate(order[:count]):
            file = f"images/{split}_{number:04d}.png"
            Image.fromarray(images[place]).resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(folder / file)
            label = min(CELLS, key=lambda share: abs(share - shares[place]))
            rows.append({"id": f"Cells-{split}-{number}", "image": file, "label": CELLS[label]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        order = order[count:]
