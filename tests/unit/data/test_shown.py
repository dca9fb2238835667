"""A picture is what a viewer shows of it: every orientation, depth and mode that PIL reads, against pixels by hand."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from mllm_keeplora.data.media.images import Looks, image_size, images_of, read_image
from mllm_keeplora.data.media.shown import CLEAR, DEEP, FIRST, TURNED, as_shown
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.errors import UserError

UPRIGHT = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10  # 3 wide, 2 high, every pixel another one
STORED = {  # EXIF orientation -> how the upright picture lies in the file
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: shown.transpose(1, 0, 2)[::-1],
    7: lambda shown: shown.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda shown: shown.transpose(1, 0, 2)[:, ::-1],
}


def saved(picture: Image.Image, kind: str, **options) -> Media:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Media("image", path=None, data=buffer.getvalue())


def pixels(media: Media) -> list:
    return np.asarray(read_image(media)).tolist()


def treated(media: Media) -> dict:
    looks = Looks()
    assert list(looks.faults([Record("r", (media,), (Turn("user", "?"),), origin="r")])) == []
    assert looks.size(media) == image_size(media) == read_image(media).size
    return dict(looks.treated)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_as_its_note_says_and_so_is_its_size(orientation, kind):
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    media = saved(picture, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert pixels(media) == UPRIGHT.tolist()
    assert image_size(media) == (3, 2)
    if kind != "TIFF":  # PIL turns those itself
        assert treated(media) == ({TURNED: 1} if orientation != 1 else {})


def test_a_photograph_is_padded_as_it_is_shown():
    exif = Image.Exif()
    exif[0x0112] = 6
    media = saved(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)
    padded = Media("image", path=None, data=media.data, pad=True)
    [shown] = images_of(Record("r", (padded,), (Turn("user", "?"),)), (0, 0, 255))
    assert shown.size == image_size(padded) == (8, 8)
    assert shown.getpixel((0, 4)) == (0, 0, 255), "the sides are added to a picture that stands upright"


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_a_note_that_makes_no_sense_says_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(saved(Image.fromarray(UPRIGHT), "PNG", exif=exif)) == UPRIGHT.tolist()


def test_a_note_beside_malformed_tags_is_followed():
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + b"\0" * 4
    media = saved(Image.fromarray(np.ascontiguousarray(STORED[6](UPRIGHT))), "PNG", exif=exif)
    assert pixels(media) == UPRIGHT.tolist()


def test_a_broken_note_says_nothing():
    data = saved(Image.fromarray(UPRIGHT), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff").data
    assert pixels(Media("image", path=None, data=data)) == UPRIGHT.tolist()


DEEP_VALUES = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_by_the_depth_of_the_type(kind):
    picture = Image.fromarray(DEEP_VALUES if kind != "JPEG2000" else np.tile(DEEP_VALUES, (4, 1)))
    media = saved(picture, kind, **({"irreversible": False} if kind == "JPEG2000" else {}))
    assert np.asarray(read_image(media))[0].tolist() == [[value] * 3 for value in (0, 1, 128, 255)]
    assert treated(media) == {DEEP: 1}


def test_the_highest_value_of_a_picture_is_not_its_white():
    dark = Image.fromarray(np.full((2, 2), 257 * 10, np.uint16))
    assert pixels(saved(dark, "PNG"))[0][0] == [10, 10, 10]


def grey_tiff(values: np.ndarray, bits: int, white_is_zero: bool = False) -> Media:
    """A TIFF with one strip of whole numbers, written by hand."""
    packed = values.astype("<u2").tobytes()
    if bits == 12:
        stream = "".join(f"{value:012b}" for value in values.flatten())
        packed = int(stream.ljust(-(-len(stream) // 8) * 8, "0"), 2).to_bytes(-(-len(stream) // 8), "big")
    entries = [
        (256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, len(packed)),
    ]  # fmt: skip
    packed += b"\0" * (len(packed) % 2)
    told = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    return Media("image", None, data=head + packed + struct.pack("<H", len(entries)) + told + b"\0" * 4)


def test_twelve_bits_are_scaled_by_twelve():
    media = grey_tiff(np.array([[0, 4095, 2048, 16]]), bits=12)
    assert [pixel[0] for pixel in pixels(media)[0]] == [0, 255, 128, 1]


def test_where_zero_is_white_it_is_shown_white():
    media = grey_tiff(np.array([[0, 65535, 257]]), bits=16, white_is_zero=True)
    assert [pixel[0] for pixel in pixels(media)[0]] == [255, 0, 254]


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70_000]])], ids=["floating", "signed"])
def test_numbers_without_black_and_white_are_refused(values):
    media = saved(Image.fromarray(values), "TIFF")
    with pytest.raises(UserError, match="do not say what is black and what is white; store it with 8 or 16 bits"):
        read_image(media)
    [fault] = Looks().faults([Record("r", (media,), (Turn("user", "?"),), origin="d.json record 3")])
    assert fault.startswith("d.json record 3: ")


CLEAR_PIXELS = {  # mode -> (picture with a hidden, a half and an opaque pixel, what is shown on white)
    "RGBA": ([(9, 9, 9, 0), (0, 0, 0, 127), (10, 20, 30, 255)], [[255] * 3, [128] * 3, [10, 20, 30]]),
    "LA": ([(9, 0), (0, 127), (40, 255)], [[255] * 3, [128] * 3, [40] * 3]),
}


@pytest.mark.parametrize("mode", CLEAR_PIXELS)
def test_transparent_places_are_white(mode):
    values, shown = CLEAR_PIXELS[mode]
    picture = Image.new(mode, (3, 1))
    picture.putdata(values)
    media = saved(picture, "PNG")
    assert pixels(media) == [shown] and treated(media) == {CLEAR: 1}


def test_a_transparent_colour_of_a_palette_is_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([5, 5, 5, 60, 70, 80])
    picture.putdata([0, 1])
    media = saved(picture, "PNG", transparency=0)
    assert pixels(media) == [[[255, 255, 255], [60, 70, 80]]] and treated(media) == {CLEAR: 1}


def test_an_opaque_picture_is_as_it_was_before():
    picture = Image.new("RGBA", (2, 1), (1, 2, 3, 255))
    media = saved(picture, "PNG")
    assert pixels(media) == [[[1, 2, 3]] * 2] and treated(media) == {}


def test_the_first_page_is_read_and_said():
    pages = [Image.new("RGB", (2, 2), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    media = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert pixels(media)[0][0] == [250, 0, 0] and treated(media) == {FIRST: 1}


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_no_picture(form):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    with pytest.raises(UserError, match="it is an animation of 2 frames; name a GIF under `video`"):
        pixels(saved(frames[0], form, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "La", "RGBa", "LAB"])
def test_every_mode_that_pil_reads_is_shown(mode):
    picture = Image.new("RGB", (2, 2), (200, 100, 50))
    if mode in ("La", "RGBa"):
        picture = picture.convert(mode[:-1] + "A")
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    shown, done = as_shown(picture if mode == "LAB" else picture.convert(mode))
    assert shown.mode == "RGB" and shown.size == (2, 2) and done == ()
    if mode in ("RGB", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa", "LAB"):
        assert np.abs(np.asarray(shown).astype(int) - (200, 100, 50)).max() <= 3
