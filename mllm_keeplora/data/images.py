"""Decode images: RGB, lazily, with the file named when it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mllm_keeplora.data.schema import Record
from mllm_keeplora.errors import UserError


def read_image(path: Path):
    """Decode one image as RGB (PIL).

    Raises:
        UserError: the file is missing, truncated or no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from None


def images_of(record: Record) -> list:
    return [read_image(media.path) for media in record.media]


def unreadable_images(records: Iterable[Record], advance: Callable[[int], None] = lambda n: None) -> list[str]:
    """Decode every image once, on several threads; a sentence for each that fails, with the record that names it."""
    first_use = {media.path: record.origin for record in records for media in record.media}

    def fault(path: Path) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return f"{first_use[path]}: {error}"
        return None

    faults = []
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(fault, first_use, chunksize=64):
            advance(1)
            if found:
                faults.append(found)
    return faults
