"""Pictures, and clips frame by frame: RGB as a viewer shows them, lazily, with the file named if it cannot be read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from mllm_keeplora.data.media.frames import kept_frames
from mllm_keeplora.data.media.pictures import named, opened, refuse_misplaced
from mllm_keeplora.data.media.shown import as_shown, shown_size
from mllm_keeplora.data.media.video import decoder_versions, is_irregular
from mllm_keeplora.data.schema import Media, Record
from mllm_keeplora.errors import UserError
from mllm_keeplora.system.known import Known, digest_file, key_of

if TYPE_CHECKING:
    import numpy as np

WINDOW = 64  # pictures that are looked at together
RULES = 3  # of decoding, refusing and showing pictures: raised when they change, so that all are looked at anew
DIGITS = 16  # of a picture's digest, by which others are told from it
REPEATED = "shorter than the frames asked for, so that some are shown more than once"
UNEVEN = "of a rate that varies, so that frames crowd where it is high; `video.clock: time` goes by seconds"
OF_CLIPS = (REPEATED, UNEVEN)

Size = tuple[int, int]  # width and height in pixels


def read_image(media: Media):
    """Decode one image as RGB (PIL), as a viewer shows it; of a clip the frame that is meant.

    Raises:
        UserError: the file is missing, outside its folder, truncated or no image; nobody knows how to show it.
    """
    if media.type == "video":
        from PIL import Image

        return Image.fromarray(_frames_of(media)[media.frame])
    with opened(media) as picture:
        return as_shown(picture)[0]


def images_of(record: Record, background: tuple[int, int, int] = (0, 0, 0)) -> list:
    """Decode the images of a record, and of its clips the frames that are seen.

    Args:
        record: names them.
        background: colour around those that are to be padded to squares.

    Raises:
        UserError: one of them cannot be read; the record is named.
    """
    try:
        return [
            padded_to_square(read_image(media), background) if media.pad else read_image(media)
            for media in record.as_pictures().media
        ]
    except UserError as error:
        raise UserError(f"{record.origin}: {error}") from None


def shown_of(record: Record, background: tuple[int, int, int] = (0, 0, 0)) -> list:
    """Decode what a record shows: pictures (PIL), and each clip as a `Clip`.

    Args:
        record: names them; its clips stay whole unless they are pictures by now (`Record.as_pictures`).
        background: colour around pictures that are to be padded to squares.

    Raises:
        UserError: one of them cannot be read; the record is named.
    """
    found = []
    for media in record.media:
        if not media.is_clip:
            found += images_of(replace(record, media=(media,)), background)
            continue
        try:
            found.append(kept_frames().clip(media))
        except UserError as error:
            raise UserError(f"{record.origin}: {error}") from None
    return found


def image_size(media: Media) -> Size:
    """Read width and height of an image as the processor gets it, from its header where the format allows.

    Raises:
        UserError: the file is missing, outside its folder or no image.
    """
    if media.type == "video":
        height, width = _frames_of(media).shape[1:3]
        return width, height
    with opened(media) as picture:
        return _put(media, shown_size(picture))


def _frames_of(media: Media) -> np.ndarray:
    """Give the frames that are seen of a clip: (n, height, width, 3) uint8."""
    return kept_frames().clip(media).frames


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
    """What was seen of a picture or clip: its content's digest, in `DIGITS`, its size, and how it was treated."""

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
    return hash((media.path, media.folder, media.data, media.start, media.end, media.files, media.video))


def _look(media: Media, known: Known) -> Look | str:
    """Give what is to be seen of a picture or clip, or what is wrong with it."""
    from PIL import __version__

    try:
        digest = _digest(media, known)
        key = key_of("picture", RULES, __version__, digest)
        if media.type == "video":
            key = key_of("clip", RULES, __version__, decoder_versions(), digest, media.video.model_dump_json())
        if (told := known.get(key)) is not None:
            width, height, *done = json.loads(told)
            return Look(digest[:DIGITS], (width, height), tuple(done))
        if media.type == "video":
            look = Look(digest[:DIGITS], image_size(media), _of_clip(media))
        else:
            with opened(media) as picture:
                shown, done = as_shown(picture)
                look = Look(digest[:DIGITS], shown.size, done)
    except UserError as error:
        return str(error)
    known.put(key, json.dumps([*look.size, *look.done]))
    return look


def _of_clip(media: Media) -> tuple[str, ...]:
    """Say what its frames tell of a clip beside what they show."""
    clip = kept_frames().clip(media)
    told = [REPEATED] if clip.total < len(clip.frames) else []
    return (*told, *([UNEVEN] if media.video.clock == "index" and not media.files and is_irregular(media) else []))


def _digest(media: Media, known: Known) -> str:
    """Digest what is seen of a picture or clip (SHA-256)."""
    if media.data is not None:
        found = hashlib.sha256(media.data).hexdigest()
    elif media.files:
        pictures = (replace(media, type="image", path=path, files=()) for path in media.files)
        found = hashlib.sha256("".join(_digest(each, known) for each in pictures).encode()).hexdigest()
    else:
        with named(media):
            refuse_misplaced(media)
            found = digest_file(media.path, known)
    if media.start is None and media.end is None:
        return found
    return hashlib.sha256(f"{found} {media.start} {media.end}".encode()).hexdigest()
