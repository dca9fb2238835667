"""Keep decoded frames on disk, so that the passes of a run, and later runs, decode a clip once.

It is a help and no more: a file that is damaged or cannot be written costs a decoding, never a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from functools import cache
from pathlib import Path

from mllm_keeplora.data.media.video import Clip, decoder_versions, read_clip
from mllm_keeplora.data.schema import Media
from mllm_keeplora.errors import UserError
from mllm_keeplora.system import files

VERSION = 1  # of what is kept; another one is made anew
SHARE = 64  # of the room that a process may fill without a look at what others have written
FULL = 7 / 8  # of the room that is left filled by such a look


class FrameCache:
    """Gives the frames that are seen of a clip, from disk where they were decoded before.

    Args:
        room: bytes that may be kept; 0 keeps nothing.
        folder: where; in the user's cache unless it is told.
    """

    def __init__(self, room: int, folder: Path | None = None):
        self._room, self._folder = room, folder or files.cache_folder() / "frames"
        self._last: tuple[Path, Clip] | None = None
        self._written: int | None = None  # bytes since the last look at the folder; None before the first

    def clip(self, media: Media) -> Clip:
        """Give the frames that are seen of a clip.

        Raises:
            UserError: it was not decoded before, and cannot be.
        """
        path = self._path(media) if self._room else None
        if path is None:
            return read_clip(media)
        if (last := self._last) is not None and last[0] == path:  # several threads may look at clips
            return last[1]
        if (clip := _kept(path)) is None:
            clip = read_clip(media)
            self._keep(path, clip)
        self._last = (path, clip)  # whose frames are asked for one by one
        return clip

    def _path(self, media: Media) -> Path | None:
        """Name the file of a clip's frames; None where the clip has no file."""
        if media.data is not None:
            identity = hashlib.sha256(media.data).hexdigest()
        else:
            try:
                described = [(each.resolve(), each.stat()) for each in media.files or (media.path,)]
            except OSError:
                return None
            identity = "\0".join(f"{path}\0{status.st_size}\0{status.st_mtime_ns}" for path, status in described)
        told = (VERSION, identity, media.path, media.folder, media.start, media.end, media.video, decoder_versions())
        digest = hashlib.sha256("\0".join(map(str, told)).encode(errors="surrogateescape")).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:]}.safetensors"

    def _keep(self, path: Path, clip: Clip) -> None:
        from safetensors.numpy import save_file

        size = clip.frames.nbytes
        if self._written is None or self._written + size > self._room // SHARE:
            self._make_room(size)
        if size > self._room * FULL:
            return
        import numpy as np

        numbers = np.array([clip.rate, clip.total, clip.seconds, *clip.times])
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"frames": clip.frames, "numbers": numbers}, temporary)
            os.replace(temporary, path)
            self._written += size

    def _make_room(self, size: int) -> None:
        """Remove the frames that were not used for longest until there is room for more."""
        kept = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        total, self._written = size + sum(size for _, size, _ in kept), 0
        for _, used, path in sorted(kept):
            if total <= self._room * FULL:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= used


@cache
def kept_frames() -> FrameCache:
    """Give this process's cache, with room for $MLLM_KEEPLORA_VIDEO_CACHE_MB MiB of frames, 4,096 unless it is set.

    Raises:
        UserError: the setting is no whole number.
    """
    room = os.environ.get("MLLM_KEEPLORA_VIDEO_CACHE_MB", "4096")
    if not room.isdecimal():
        raise UserError(f"MLLM_KEEPLORA_VIDEO_CACHE_MB must be a whole number of MiB, at least 0; got {room!r}")
    return FrameCache(int(room) << 20)


def _kept(path: Path) -> Clip | None:
    """Read frames that were kept, and note that they were used; None where there are none, or damaged ones."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(path.read_bytes())
        frames, (rate, total, seconds, *times) = found["frames"], found["numbers"].tolist()
        with contextlib.suppress(OSError):
            os.utime(path)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return Clip(frames, tuple(times), rate, int(total), seconds)
