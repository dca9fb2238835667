"""Decode images: RGB as a viewer shows them, lazily, with the file named when it cannot be read."""

from __future__ import annotations

import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from mllm_keeplora.data.media.shown import as_shown, shown_size
from mllm_keeplora.data.schema import Media, Record
from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import given

WINDOW = 64  # pictures that are looked at together
# No other decoder is tried: some call other programs, and few people look at the rare ones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MOST_PIXELS = 80_000_000  # of a picture; told by its header, before anything is decoded

Size = tuple[int, int]  # width and height in pixels


def read_image(media: Media):
    """Decode one image as RGB (PIL), as a viewer shows it.

    Raises:
        UserError: the file is missing, outside its folder, truncated or no image; nobody knows how to show it.
    """
    with _opened(media) as picture:
        return as_shown(picture)[0]


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


def image_size(media: Media) -> Size:
    """Read width and height of an image as the processor gets it, from its header where the format allows.

    Raises:
        UserError: the file is missing, outside its folder or no image.
    """
    with _opened(media) as picture:
        return _put(media, shown_size(picture))


def _put(media: Media, size: Size) -> Size:
    return (max(size),) * 2 if media.pad else size


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


class Looks:
    """Remembers what was seen of pictures that were decoded once: their sizes, and how many needed which treatment."""

    def __init__(self) -> None:
        self.treated: Counter[str] = Counter()  # what was done, as `data.media.shown` names it -> pictures
        self._sizes: dict[int, Size] = {}

    def size(self, media: Media) -> Size:
        """Give the size of a picture as the processor gets it; reads its header if it was not looked at.

        Raises:
            UserError: it cannot be read.
        """
        seen = self._sizes.get(_key(media))
        return image_size(media) if seen is None else _put(media, seen)

    def faults(self, records: Iterable[Record], advance: Callable[[int], None] = lambda n: None) -> Iterator[str]:
        """Decode every image once, on several threads, and tell each that fails with the record that names it.

        Args:
            records: any number of them; only a few are held at once.
            advance: told after every record.
        """
        uses = self._first_uses(records, advance)
        with ThreadPoolExecutor(4) as pool:
            while window := list(islice(uses, WINDOW)):
                for (origin, media), found in zip(window, pool.map(_look, (media for _, media in window)), strict=True):
                    if isinstance(found, str):
                        yield f"{origin}: {found}"
                    else:
                        self._sizes[_key(media)], done = found
                        self.treated.update(done)

    def _first_uses(self, records: Iterable[Record], advance: Callable[[int], None]) -> Iterator[tuple[str, Media]]:
        seen = set(self._sizes)
        for record in records:
            for media in record.media:
                if (key := _key(media)) not in seen:
                    seen.add(key)
                    yield record.origin, media
            advance(1)


def _key(media: Media) -> int:
    return hash((media.path, media.folder, media.data))


def _look(media: Media) -> tuple[Size, tuple[str, ...]] | str:
    """Give a picture's size and how it was treated, or what is wrong with it."""
    try:
        with _opened(media) as picture:
            shown, done = as_shown(picture)
            return shown.size, done
    except UserError as error:
        return str(error)


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
                near = _near(path, folder or path.parent)
                hint = f"; there is {str(near)!r}" if near is not None else ""
                if near is not None and _composed(near) == _composed(name):
                    hint += ", whose accents are written in another Unicode normal form"
                raise UserError(f"image {str(name)!r} {what} in {folder or path.parent}{hint}")
        source = given.opened(path) if media.data is None else io.BytesIO(media.data)
        with source, Image.open(source, formats=_formats()) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                told = f"{width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are decoded, so make it smaller"
                raise UserError(f"image {path} has {told}")
            yield picture
    except (UserError, MemoryError):  # too little memory is no fault of the picture
        raise
    except Image.DecompressionBombError as error:
        told = f"more pixels than the {MOST_PIXELS:,} that are decoded, so make it smaller"
        raise UserError(f"image {path} has {told} ({first_line(error)})") from None
    except UnidentifiedImageError:
        told = f"it is damaged, or none of {', '.join(_formats())}"
        raise UserError(f"image {path} cannot be read: {told}") from None
    except Exception as error:  # of whatever kind a decoder raises
        raise UserError(f"image {path} cannot be read: {shortened(first_line(error))}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Name the formats that are decoded here; older Pillows lack AVIF."""
    from PIL import Image

    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


@lru_cache(64)
def _entries(folder: Path) -> dict[str, str]:
    """Name the entries of a folder by what is alike of them; a listing serves all files that are missing in it."""
    return {_alike(name): name for name in os.listdir(folder)} if folder.is_dir() else {}


def _alike(name: str) -> str:
    return _composed(name).casefold().strip()


def _composed(name: str | Path) -> str:
    return unicodedata.normalize("NFC", str(name))


def _near(path: Path, folder: Path) -> Path | None:
    """Find the file that a name is likely to mean: other letters for the same text, case, slashes, spaces, escapes.

    Leading folders of the name, as of another machine, may be missing.

    Returns:
        Its path below `folder`.
    """
    named = path.relative_to(folder) if path.is_relative_to(folder) else path
    parts = unquote(str(named)).replace("\\", "/").split("/")
    for start in range(len(parts)):
        place: Path | None = folder
        for part in parts[start:]:
            found = _entries(place).get(_alike(part))
            place = place / found if found is not None else None
            if place is None:
                break
        if place is not None and place.is_file():
            return place.relative_to(folder)
    return None
