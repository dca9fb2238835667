"""A picture as a viewer shows it: turned by its note, eight bits a colour, transparent places on white.

Kinds of numbers for which viewers know no black and no white (signed, floating, 32 bits) are refused.
"""

from __future__ import annotations

import struct
from typing import Any

GROUND = (255, 255, 255)  # what is seen through transparent places
ORIENTATION = 0x0112  # EXIF and TIFF tag
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
PHOTOMETRIC, BITS = 262, 258  # TIFF tags
WHITE_IS_ZERO = 0
FULL_SCALE = {"PNG", "PPM", "JPEG2000"}  # formats whose mode I holds 16 bits, from 0 to 65535

PART = 1 << 20  # numbers that are scaled at once

# What was done to a picture, as `check` counts it.
TURNED = "turned by their EXIF note"
DEEP = "scaled down from more than 8 bits a colour"
CLEAR = "put on white where they are transparent"
FIRST = "read as their first page"
ANIMATIONS = ("GIF", "WEBP", "PNG")  # whose further frames are shown one after the other


def as_shown(picture: Any) -> tuple[Any, tuple[str, ...]]:
    """Turn an opened picture (PIL) into RGB as a viewer shows it, and say what that took.

    Raises:
        ValueError: its numbers do not say what is black and what is white, or it is an animation.
    """
    from PIL import Image

    done = []
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a phone's second frame is a preview
        if picture.format in ANIMATIONS:
            told = f"it is an animation of {picture.n_frames} frames"
            raise ValueError(f"{told}; name a GIF under `video`, or store the frame that is meant")
        done.append(FIRST)
    scale = _scale(picture)  # before loading and turning, which forget what the file says
    picture.load()
    if (turn := orientation(picture)) != 1:
        picture = picture.transpose(Image.Transpose[TURNS[turn]])
        done.append(TURNED)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        picture = _to_eight_bits(picture, *scale)
        done.append(DEEP)
    if picture.has_transparency_data:  # of La and RGBa colours are stored multiplied by it
        picture = picture.convert("LA") if picture.mode == "La" else picture
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        if picture.getextrema()[3][0] < 255:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*GROUND, 255)), picture)
            done.append(CLEAR)
    return picture.convert("RGB"), tuple(done)


def shown_size(picture: Any) -> tuple[int, int]:
    """Give width and height of an opened picture as it is shown, from its header where the format allows."""
    width, height = picture.size
    swapped = picture.format != "TIFF" and orientation(picture) in SIDEWAYS  # PIL itself turns a TIFF
    return (height, width) if swapped else (width, height)


def orientation(picture: Any) -> int:
    """Read the EXIF note of how a picture is to be turned: 1 (not at all) to 8; a broken note says nothing."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1
    return found if found in range(1, 9) else 1


def _scale(picture: Any) -> tuple[int | None, bool]:
    """Give the bits of a grey picture's numbers, None where they have no white; and whether 0 is white in them."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in FULL_SCALE):
        return None, False
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(BITS, (16,))
    return (bits[0] if isinstance(bits, tuple) else bits), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _to_eight_bits(picture: Any, bits: int | None, inverted: bool) -> Any:
    import numpy as np
    from PIL import Image

    if bits is None:
        kind = "floating" if picture.mode == "F" else "signed or 32-bit"
        raise ValueError(f"its {kind} numbers do not say what is black and what is white; store it with 8 or 16 bits")
    found = np.asarray(picture)
    shown = np.empty(found.shape, np.uint8)
    for start in range(0, found.size, PART):  # the whole in float64 would be eight times the picture
        values = found.reshape(-1)[start : start + PART].astype(np.float64) * (255 / (2**bits - 1))
        shown.reshape(-1)[start : start + PART] = np.rint(255 - values if inverted else values).clip(0, 255)
    return Image.fromarray(shown)
