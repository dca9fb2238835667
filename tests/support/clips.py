"""Clips that are drawn for tests: every frame carries its number in six squares, light where a bit of it is set."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

SIDE = 16  # pixels of a square


def numbered(number: int) -> np.ndarray:
    """Draw the frame of a number below 64: (2 x SIDE, 3 x SIDE, 3) uint8."""
    bits = np.array([(number >> bit) & 1 for bit in range(6)], np.uint8).reshape(2, 3) * 255
    return np.repeat(bits.repeat(SIDE, 0).repeat(SIDE, 1)[..., None], 3, 2)


def number_of(frame: np.ndarray) -> int:
    """Read the number of a frame of any size."""
    height, width = frame.shape[:2]
    lights = [frame[height * (2 * (b // 3) + 1) // 4, width * (2 * (b % 3) + 1) // 6].mean() > 128 for b in range(6)]
    return sum(1 << bit for bit, light in enumerate(lights) if light)


def write_clip(
    path: Path,
    frames: int = 50,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 25,
    stamps: Sequence[int] | None = None,
    sound: bool = False,
    picture: bool = True,
    size: tuple[int, int] | None = None,
    muxer: dict[str, str] | None = None,
    **coder: str,
) -> Path:
    """Write a clip.

    Args:
        path: its suffix names the container.
        stamps: at which tick of 1/rate seconds each frame is shown; one after the other unless told.
        sound: adds a second of silence more than the pictures last.
        picture: False leaves the sound alone.
        size: width and height, of the drawn frame unless told.
        muxer, coder: options of the container and of the encoder.
    """
    import av

    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=coder) if picture else None
        voice = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        if stream is not None:
            stream.width, stream.height = size or (3 * SIDE, 2 * SIDE)
            stream.pix_fmt = pixels
            for place in range(frames):
                frame = av.VideoFrame.from_ndarray(numbered(place % 64), format="rgb24")
                frame = frame.reformat(*(size or (None, None)), format=pixels)
                frame.pts, frame.time_base = (stamps[place] if stamps else place), Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if voice is not None:
            for part in range(int((frames / rate + 1) * 16000 / 1024)):
                still = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                still.sample_rate, still.pts = 16000, part * 1024
                container.mux(voice.encode(still))
            container.mux(voice.encode())
    return path


def packets_of(path: Path) -> list[tuple[int, int]]:
    """Give place and size in the file of each packet of a clip, in the file's order."""
    import av

    with av.open(str(path)) as container:
        return sorted((each.pos, each.size) for each in container.demux(container.streams.video[0]) if each.size)
