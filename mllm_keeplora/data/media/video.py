"""Decode clips: the frames that are asked for, all of them or none, with the file named when it cannot be read.

A clip is read twice: its packets alone, which tell how many frames there are and when each is shown, then those frames
that are seen. What a header promises is compared with what is there, since decoders pass over what is missing.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from mllm_keeplora.data.media.pictures import MOST_PIXELS, opened, refuse_misplaced
from mllm_keeplora.data.media.sampling import SAME_TIME, VideoOptions, chosen
from mllm_keeplora.data.media.shown import as_shown
from mllm_keeplora.data.schema import Media
from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import given

if TYPE_CHECKING:
    import numpy as np

# No other container or decoder is tried: some read what else they name, and few people look at the rare ones.
CONTAINERS = ("mov", "matroska", "avi", "gif", "mpeg", "mpegts", "flv", "asf", "ogg", "ivf")
CODECS = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg4", "msmpeg4", "mpeg1video", "mpeg2video", "h263",
          "mjpeg", "ffv1", "gif", "theora", "wmv1", "wmv2", "wmv3", "vc1", "flv", "prores", "dnxhd", "rawvideo", "png",
          "qtrle")  # fmt: skip
MISSING = 2  # frames that a clip may be short of its promise: the last one stands for them
REMEDY = "encode it again or leave it out"
IRREGULAR = 3  # times the usual gap between two frames, from which on a clip's rate is told to vary
CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)$")  # a duration as Matroska notes it


class Clip(NamedTuple):
    """The frames of a clip that are seen.

    Attributes:
        frames: (n, height, width, 3) uint8, RGB.
        times: (n,) seconds from the start of what is asked of the clip.
        rate: frames a second of the clip.
        total: frames of the clip, or of the part that is asked for.
        seconds: how long it lasts.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    rate: float
    total: int
    seconds: float

    @property
    def extent(self) -> ClipExtent:
        """Say all but the colours."""
        count, height, width, _ = self.frames.shape
        return ClipExtent(width, height, count, self.times, self.rate, self.total, self.seconds)


class ClipExtent(NamedTuple):
    """What a base's processor may ask about a clip beside its colours: `Clip` has the rest."""

    width: int
    height: int
    count: int
    times: tuple[float, ...]
    rate: float
    total: int
    seconds: float

    def blank(self) -> Clip:
        """Make a black clip of this extent."""
        import numpy as np

        frames = np.zeros((self.count, self.height, self.width, 3), np.uint8)
        return Clip(frames, self.times, self.rate, self.total, self.seconds)

    def metadata(self) -> dict[str, Any]:
        """Tell transformers' processors which frames of a clip are given, so that none samples or guesses anew."""
        indices = [round(second * self.rate) for second in self.times]
        told = {"total_num_frames": self.total, "fps": self.rate, "duration": self.seconds, "frames_indices": indices}
        return {**told, "height": self.height, "width": self.width}


class Packets(NamedTuple):
    """What the packets of a clip's first video stream tell; stamps are whole numbers of `unit` seconds, ascending.

    Without `keys` frames do not know their own stamps: they are counted from the first on.
    """

    stamps: tuple[int, ...]
    keys: tuple[int, ...]
    unit: float
    usual: float  # seconds between two frames
    rate: float

    def seconds(self, stamp: int) -> float:
        return (stamp - self.stamps[0]) * self.unit


def read_clip(media: Media) -> Clip:
    """Decode the frames of a clip that are seen, as its `video` says.

    Raises:
        UserError: the file is missing, outside its folder, no clip, cut off, damaged, or shorter than the part asked
            for; PyAV is not installed.
    """
    import numpy as np

    options = media.video or VideoOptions()
    if media.files:
        return _of_pictures(media, options)
    with _opened(media) as source:
        with _container(source) as container:
            packets = _packets(container)
        stamps = _range(packets, media)
        start = packets.seconds(stamps[0])
        times = [packets.seconds(stamp) - start for stamp in stamps]
        wanted = [stamps[place] for place in chosen(times, options)]
        source.seek(0)
        with _container(source) as container:
            found = dict(_frames(container, packets, sorted(set(wanted)), options.max_side))
    seen = tuple(packets.seconds(stamp) - start for stamp in wanted)
    frames = np.stack([found[stamp] for stamp in wanted])
    return Clip(frames, seen, packets.rate, len(stamps), times[-1] + packets.usual)


def is_irregular(media: Media) -> bool:
    """Tell whether there are gaps between a clip's frames that are far longer than the usual one.

    Raises:
        UserError: the clip cannot be read.
    """
    with _opened(media) as source, _container(source) as container:
        packets = _packets(container)
    gaps = [later - earlier for earlier, later in pairwise(_range(packets, media))]
    return bool(gaps) and max(gaps) > IRREGULAR * median(gaps)


def decoder_versions() -> str:
    """Name the versions of PyAV and of the decoders inside it, by which frames are told from others."""
    _pyav()
    from av import __version__, library_versions

    return f"av {__version__}, libavcodec {'.'.join(map(str, library_versions['libavcodec']))}"


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("videos are decoded by PyAV: pip install 'mllm-keeplora[video]'") from None
    return av


def _of_pictures(media: Media, options: VideoOptions) -> Clip:
    """Read a clip that is given as pictures, one a second as far as anybody knows."""
    import numpy as np

    times = [float(place) for place in range(len(media.files))]
    wanted = chosen(times, options)
    pictures = {}
    for place in wanted:
        with opened(replace(media, type="image", path=media.files[place], files=())) as picture:
            pictures[place] = as_shown(picture)[0]
    size = next(iter(pictures.values())).size
    if other := next((place for place in wanted if pictures[place].size != size), None):
        told = f"{size[0]} x {size[1]} pixels, and {media.files[other]} has {{}} x {{}}".format(*pictures[other].size)
        raise UserError(f"video {media.path} is given as pictures, of which the first has {told}; make them alike")
    for picture in pictures.values():
        picture.thumbnail((options.max_side, options.max_side))
    frames = np.stack([np.asarray(pictures[place]) for place in wanted])
    return Clip(frames, tuple(times[place] for place in wanted), 1.0, len(times), float(len(times)))


@contextmanager
def _opened(media: Media) -> Iterator[BinaryIO]:
    """Open a clip's file, and tell what is wrong with it with its name."""
    _pyav()
    if media.data is None:
        refuse_misplaced(media)
    with given.opened(media.path) if media.data is None else io.BytesIO(media.data) as source:
        try:
            if not source.read(1):
                raise ValueError("it has 0 bytes")
            source.seek(0)
            yield source
        except (UserError, MemoryError):  # too little memory is no fault of the clip
            raise
        except Exception as error:  # of whatever kind a decoder raises
            raise UserError(f"video {media.path} cannot be read: {shortened(_why(error))}") from None


def _why(error: Exception) -> str:
    """Give the words of an error without the place in a decoder's code where it arose."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def _container(source: BinaryIO) -> Iterator[Any]:
    """Open what is in a file by its content: containers and decoders of the lists alone, and no other file."""
    av = _pyav()
    options = {"format_whitelist": ",".join(_demuxers()), "protocol_whitelist": "none",
               "codec_whitelist": ",".join(CODECS)}  # fmt: skip
    try:
        container = av.open(source, options=options)
    except av.error.FFmpegError as error:
        told = f"it is damaged, ends before its index, or is none of {', '.join(CONTAINERS)}"
        raise ValueError(f"{told} ({_why(error)})") from None
    with container:
        if not container.streams.video:
            raise ValueError("it holds no video stream")
        yield container


@cache
def _demuxers() -> tuple[str, ...]:
    """Name the allowed containers as the decoder does: one entry of its list may be several names."""
    av = _pyav()
    return tuple(
        name
        for name in sorted(av.formats_available)
        if any(each in name.split(",") for each in CONTAINERS) and _can_be_read(name)
    )


def _can_be_read(name: str) -> bool:
    av = _pyav()
    try:
        return av.ContainerFormat(name).is_input
    except ValueError:
        return False


def _packets(container: Any) -> Packets:
    """Read a clip's packets without decoding them.

    Raises:
        ValueError: there is none, or fewer than the header promises.
    """
    stream = container.streams.video[0]
    read = [packet for packet in container.demux(stream) if packet.size]
    count, promised = len(read), stream.frames
    if not count:
        raise ValueError("it holds no frame")
    if promised - count > MISSING:
        raise ValueError(f"it holds {count} of the {promised} frames that its header promises; {REMEDY}")
    shown = [packet for packet in read if not packet.is_discard]
    # AVI notes when a packet is decoded, not when its frame is shown.
    stamped = container.format.name != "avi" and all(packet.pts is not None for packet in shown)
    stamps = sorted(packet.pts if packet.pts is not None else packet.dts or 0 for packet in shown)
    keys = sorted(packet.pts for packet in shown if packet.is_keyframe) if stamped else []
    unit = float(stream.time_base)
    gaps = [(later - earlier) * unit for earlier, later in pairwise(stamps)]
    rate = float(stream.average_rate or stream.guessed_rate or 0) or (
        1 / median(gaps) if gaps and median(gaps) else 1.0
    )
    usual = median(gaps) if gaps else 1 / rate
    end = _end(container, stream)
    if end is not None and end - (stamps[-1] * unit + usual) > MISSING * usual + SAME_TIME + unit:
        whole = end - stamps[0] * unit
        told = f"it ends after {stamps[-1] * unit + usual - stamps[0] * unit:.2f} of {whole:.2f} s"
        raise ValueError(f"{told}, cut off; {REMEDY}")
    return Packets(tuple(stamps), tuple(keys), unit, usual, rate)


def _end(container: Any, stream: Any) -> float | None:
    """Give the second at which a header says that a video stream ends; None where it does not."""
    if stream.duration:
        return float((stream.start_time or 0) * stream.time_base + stream.duration * stream.time_base)
    if noted := CLOCK.match(stream.metadata.get("DURATION", "").strip()):
        hours, minutes, seconds = noted.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return None  # that of the container may be that of its sound


def _range(packets: Packets, media: Media) -> tuple[int, ...]:
    """Give the stamps of the part of a clip that is asked for, both ends counted.

    Raises:
        ValueError: the clip is shorter, or no frame is shown then.
    """
    if media.start is None and media.end is None:
        return packets.stamps
    whole = packets.seconds(packets.stamps[-1]) + packets.usual
    start, end = media.start or 0.0, whole if media.end is None else media.end
    if not 0 <= start < end <= whole + MISSING * packets.usual + SAME_TIME:
        raise ValueError(f"{start:g} to {end:g} s is asked of it, and it lasts {whole:.2f} s")
    seconds = [packets.seconds(stamp) for stamp in packets.stamps]
    stamps = packets.stamps[bisect_left(seconds, start - SAME_TIME) : bisect_right(seconds, end + SAME_TIME)]
    if not stamps:
        raise ValueError(f"no frame of it is shown from {start:g} to {end:g} s")
    return stamps


def _frames(container: Any, packets: Packets, wanted: Sequence[int], max_side: int) -> Iterator[tuple[int, Any]]:
    """Decode frames by their stamps, ascending; what lies between is passed over from key frame to key frame.

    Raises:
        ValueError: one of them cannot be decoded.
    """
    av, stream = _pyav(), container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "SLICE", 1  # many clips are read side by side
    stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}
    places = {stamp: number for number, stamp in enumerate(packets.stamps)}
    decoded, place, last = container.decode(stream), -1, None
    try:
        for stamp in wanted:
            if (
                place >= 0
                and (before := bisect_right(packets.keys, stamp))
                and places[packets.keys[before - 1]] > place + 1
            ):
                container.seek(packets.keys[before - 1], stream=stream)
                decoded = container.decode(stream)
            while place < places[stamp] and (frame := next(decoded, None)) is not None:
                place, last = places.get(frame.pts, place) if packets.keys else place + 1, frame
            if last is None or abs(places[stamp] - place) > MISSING:  # else its neighbour stands for it
                raise ValueError(f"it decodes to frame {place + 1} of {len(places)}; {REMEDY}")
            if last.is_corrupt:
                raise ValueError(f"frame {place + 1} of {len(places)} is damaged; {REMEDY}")
            yield stamp, _reduced(last, max_side)
    except av.error.FFmpegError as error:
        told = f"it decodes to frame {place + 1} of {len(places)} ({_why(error)})"
        raise ValueError(f"{told}; {REMEDY}") from None


def _reduced(frame: Any, max_side: int) -> np.ndarray:
    """Make a frame small before it becomes an array, and turn it as its container says."""
    import numpy as np

    scale = min(1.0, max_side / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    small = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(small, round(frame.rotation / 90) % 4))
