"""Decode images: RGB, lazily, with the file named when it cannot be read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from mllm_keeplora.data.schema import Media, Record
from mllm_keeplora.errors import UserError

WINDOW = 64  # pictures that are looked at together


def read_image(media: Media):
    """Decode one image as RGB (PIL).

    Raises:
        UserError: the file is missing, outside its folder, truncated or no image.
    """
    with _opened(media) as picture:
        return picture.convert("RGB")


def images_of(record: Record, background: tuple[int, int, int] = (0, 0, 0)) -> list:
    """Decode the images of a record.

    Args:
        record: names them.
        background: colour around those that are to be padded to squares.

    Raises:
        UserError: one of them cannot be read; the record is named.
    """
    try:
        return [
            padded_to_square(read_image(media), background) if media.pad else read_image(media)
            for media in record.media
        ]
    except UserError as error:
        raise UserError(f"{record.origin}: {error}") from None


def image_size(media: Media) -> tuple[int, int]:
    """Read width and height of an image as the processor gets it, from its header alone.

    Raises:
        UserError: the file is missing, outside its folder or no image.
    """
    with _opened(media) as picture:
        width, height = picture.size
    return (max(width, height),) * 2 if media.pad else (width, height)


def padded_to_square(picture, background: tuple[int, int, int]):
    """Put a picture into the middle of a square of its longer side.

    Source: LLaVA-1.5, `image_aspect_ratio = pad`.
    """
    from PIL import Image

    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def unreadable_images(records: Iterable[Record], advance: Callable[[int], None] = lambda n: None) -> Iterator[str]:
    """Decode every image once, on several threads, and tell each that fails with the record that names it.

    Args:
        records: any number of them; only a few are held at once.
        advance: told after every record.
    """

    def first_uses() -> Iterator[tuple[str, Media]]:
        seen: set[int] = set()
        for record in records:
            for media in record.media:
                key = hash((media.path, media.folder, media.data))
                if key not in seen:
                    seen.add(key)
                    yield record.origin, media
            advance(1)

    def fault(use: tuple[str, Media]) -> str | None:
        try:
            read_image(use[1])
        except UserError as error:
            return f"{use[0]}: {error}"
        return None

    uses = first_uses()
    with ThreadPoolExecutor(4) as pool:
        while window := list(islice(uses, WINDOW)):
            yield from (found for found in pool.map(fault, window) if found)


@contextmanager
def _opened(media: Media) -> Iterator:
    """Open a picture (PIL), read as far as the caller needs it; what is wrong with it is told with its name."""
    from PIL import Image, UnidentifiedImageError

    path, folder = media.path, media.folder
    try:
        if media.data is None:
            name = path.relative_to(folder) if folder is not None and path.is_relative_to(folder) else path
            # The name may not lead out of the data folder; links inside it are followed.
            if folder is not None and not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
                raise UserError(f"image {str(name)!r} leaves the data folder {folder}; `images` may name one above it")
            if not path.is_file():
                what = "is no file" if path.exists() else "does not exist"
                raise UserError(f"image {str(name)!r} {what} in {folder or path.parent}")
        with Image.open(path if media.data is None else io.BytesIO(media.data)) as picture:
            yield picture
    except UserError:
        raise
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from None
