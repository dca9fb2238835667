"""Decode images: RGB as a viewer shows them, lazily, with the file named when it cannot be read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from mllm_keeplora.data.media.shown import as_shown, shown_size
from mllm_keeplora.data.schema import Media, Record
from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import given
from mllm_keeplora.system.known import Known, digest_file, key_of

WINDOW = 64  # pictures that are looked at together
RULES = 2  # of decoding, refusing and showing pictures: raised when they change, so that all are looked at anew
DIGITS = 16  # of a picture's digest, by which others are told from it
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


class Look(NamedTuple):
    """What was seen of a picture: its content's digest, in `DIGITS`, its size as shown, and how it was treated."""

    digest: str
    size: Size
    done: tuple[str, ...]


class Looks:
    """Remembers what was seen of pictures that were decoded once: their sizes, and how many needed which treatment.

    Args:
        known: keeps what is seen for later processes; a picture that is refused is looked at each time.
    """

    def __init__(self, known: Known | None = None) -> None:
        self.treated: Counter[str] = Counter()  # what was done, as `data.media.shown` names it -> pictures
        self._known = known or Known()
        self._seen: dict[int, Look] = {}

    def size(self, media: Media) -> Size:
        """Give the size of a picture as the processor gets it; reads its header if it was not looked at.

        Raises:
            UserError: it cannot be read.
        """
        seen = self._seen.get(_key(media))
        return image_size(media) if seen is None else _put(media, seen.size)

    def faults(
        self,
        records: Iterable[Record],
        advance: Callable[[int], None] = lambda n: None,
        digests: list[str] | None = None,
    ) -> Iterator[str]:
        """Look at every image once, on several threads, and tell each that fails with the record that names it.

        Args:
            records: any number of them; only a few are held at once.
            advance: told after every record.
            digests: gets, at the end, a text for each record: the digests of its pictures, one after the other.
        """
        shown: list[tuple[int, ...]] = []
        uses = self._first_uses(records, advance, shown)
        with ThreadPoolExecutor(4) as pool:
            while window := list(islice(uses, WINDOW)):
                looks = pool.map(partial(_look, known=self._known), (media for _, media in window))
                for (origin, media), found in zip(window, looks, strict=True):
                    if isinstance(found, str):
                        yield f"{origin}: {found}"
                    else:
                        self._seen[_key(media)] = found
                        self.treated.update(found.done)
        if digests is not None:
            digests += ["".join(self._seen[key].digest for key in keys if key in self._seen) for keys in shown]

    def _first_uses(
        self, records: Iterable[Record], advance: Callable[[int], None], shown: list[tuple[int, ...]]
    ) -> Iterator[tuple[str, Media]]:
        seen = set(self._seen)
        for record in records:
            keys = tuple(map(_key, record.media))
            for key, media in zip(keys, record.media, strict=True):
                if key not in seen:
                    seen.add(key)
                    yield record.origin, media
            shown.append(keys)
            advance(1)


def digests_of(records: Iterable[Record]) -> list[str]:
    """Give for each record what `Looks.faults` does as its digests, without a picture being decoded.

    Raises:
        UserError: a picture is missing or cannot be read.
    """
    with Known.of_user() as known:
        return ["".join(_digest(media, known)[:DIGITS] for media in record.media) for record in records]


def _key(media: Media) -> int:
    return hash((media.path, media.folder, media.data))


def _look(media: Media, known: Known) -> Look | str:
    """Give what is to be seen of a picture, or what is wrong with it."""
    from PIL import __version__

    try:
        digest = _digest(media, known)
        key = key_of("picture", RULES, __version__, digest)
        if (told := known.get(key)) is not None:
            width, height, *done = json.loads(told)
            return Look(digest[:DIGITS], (width, height), tuple(done))
        with _opened(media) as picture:
            shown, done = as_shown(picture)
            look = Look(digest[:DIGITS], shown.size, done)
    except UserError as error:
        return str(error)
    known.put(key, json.dumps([*look.size, *look.done]))
    return look


def _digest(media: Media, known: Known) -> str:
    if media.data is not None:
        return hashlib.sha256(media.data).hexdigest()
    with _named(media):
        refuse_misplaced(media)
        return digest_file(media.path, known)


@contextmanager
def _opened(media: Media) -> Iterator:
    """Open a picture (PIL), read as far as the caller needs it."""
    from PIL import Image

    with _named(media):
        if media.data is None:
            refuse_misplaced(media)
        source = given.opened(media.path) if media.data is None else io.BytesIO(media.data)
        with source, Image.open(source, formats=_formats()) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                told = f"{width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are decoded, so make it smaller"
                raise UserError(f"image {media.path} has {told}")
            yield picture


@contextmanager
def _named(media: Media) -> Iterator[None]:
    """Tell what is wrong with a picture with its name."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (UserError, MemoryError):  # too little memory is no fault of the picture
        raise
    except Image.DecompressionBombError as error:
        told = f"more pixels than the {MOST_PIXELS:,} that are decoded, so make it smaller"
        raise UserError(f"image {media.path} has {told} ({first_line(error)})") from None
    except UnidentifiedImageError:
        told = f"it is damaged, or none of {', '.join(_formats())}"
        raise UserError(f"image {media.path} cannot be read: {told}") from None
    except Exception as error:  # of whatever kind a decoder raises
        raise UserError(f"image {media.path} cannot be read: {shortened(first_line(error))}") from None


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
