"""Open one picture's file: by a list of formats, within its folder, with the file named when it cannot be read."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from urllib.parse import unquote

from mllm_keeplora.data.schema import Media
from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import given

# No other decoder is tried: some call other programs, and few people look at the rare ones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MOST_PIXELS = 80_000_000  # of a picture; told by its header, before anything is decoded


@contextmanager
def opened(media: Media) -> Iterator:
    """Open a picture (PIL), read as far as the caller needs it."""
    from PIL import Image

    with named(media):
        if media.data is None:
            refuse_misplaced(media)
        source = given.opened(media.path) if media.data is None else io.BytesIO(media.data)
        with source, Image.open(source, formats=_formats()) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                told = f"{width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are decoded, so make it smaller"
                raise UserError(f"{media.type} {media.path} has {told}")
            yield picture


@contextmanager
def named(media: Media) -> Iterator[None]:
    """Tell what is wrong with a picture or clip with its name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (UserError, MemoryError):  # too little memory is no fault of the picture
        raise
    except Image.DecompressionBombError as error:
        told = f"more pixels than the {MOST_PIXELS:,} that are decoded, so make it smaller"
        raise UserError(f"{media.type} {media.path} has {told} ({first_line(error)})") from None
    except UnidentifiedImageError:
        told = f"it is damaged, or none of {', '.join(_formats())}"
        raise UserError(f"{media.type} {media.path} cannot be read: {told}") from None
    except Exception as error:  # of whatever kind a decoder raises
        raise UserError(f"{media.type} {media.path} cannot be read: {shortened(first_line(error))}") from None


def refuse_misplaced(media: Media) -> None:
    """Raise a UserError if the file of a picture or clip is not there, or not in its folder; a name near it is told."""
    path, folder = media.path, media.folder
    # The name may not lead out of the data folder; links inside it are followed.
    if folder is not None and not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
        name = _name(path, folder)
        raise UserError(f"{media.type} {str(name)!r} leaves the data folder {folder}; `images` may name one above it")
    if not path.is_file():
        name, what = _name(path, folder), "is no file" if path.exists() else "does not exist"
        near = _near(path, folder or path.parent)
        hint = f"; there is {str(near)!r}" if near is not None else ""
        if near is not None and _composed(near) == _composed(name):
            hint += ", whose accents are written in another Unicode normal form"
        raise UserError(f"{media.type} {str(name)!r} {what} in {folder or path.parent}{hint}")


def _name(path: Path, folder: Path | None) -> Path:
    return path.relative_to(folder) if folder is not None and path.is_relative_to(folder) else path


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
    parts = unquote(str(_name(path, folder))).replace("\\", "/").split("/")
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
