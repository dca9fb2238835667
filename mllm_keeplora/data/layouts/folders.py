"""Data sets whose folders are the classes; MTIL splits them itself, 80 to 20."""

from __future__ import annotations

from pathlib import Path

from mllm_keeplora.data.layouts.published import Published, lines_of, split_80_20, subfolders
from mllm_keeplora.errors import UserError

NO_CLASS = "BACKGROUND_Google"
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def caltech101(path: Path, split: str) -> Published:
    """Read Caltech101: sorted categories; their pictures are numbered from 1, and as many as the folder has files."""
    base = path / "101_ObjectCategories"
    categories = [name for name in subfolders(base) if name != NO_CLASS]
    files = [
        (f"{base.name}/{name}/image_{number:04d}.jpg", name)
        for name in categories
        for number in range(1, 1 + sum(1 for _ in (base / name).iterdir()))
    ]
    return Published(categories, split_80_20(files, split))


def eurosat(path: Path, split: str) -> Published:
    """Read EuroSAT (RGB): sorted folders, in each the sorted names."""
    labels = subfolders(path)
    files = [
        (f"{name}/{file}", name)
        for name in labels
        for file in sorted(each.name for each in (path / name).iterdir() if each.name.lower().endswith(ENDINGS))
    ]
    return Published(labels, split_80_20(files, split))


def sun397(path: Path, split: str) -> Published:
    """Read SUN397: `ClassName.txt`, and all pictures in the order of their sorted paths.

    torchvision takes the order of the file system, so that no two machines share its split.
    """
    labels = [line.removeprefix("/").partition("/")[2] for line in lines_of(path / "ClassName.txt")]
    found = sorted(each.relative_to(path) for each in path.rglob("sun_*.jpg"))
    if not found:
        raise UserError(f"{path} holds no sun_*.jpg")
    files = [(each.as_posix(), "/".join(each.parts[1:-1])) for each in found]
    return Published(labels, split_80_20(files, split))
