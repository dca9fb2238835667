"""Clips: which frames are seen, of every container alike, and what is told of one that is broken."""

import re
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_keeplora.data.media import frames as kept_frames
from mllm_keeplora.data.media.frames import FrameCache
from mllm_keeplora.data.media.sampling import VideoOptions, chosen
from mllm_keeplora.data.media.video import is_irregular, read_clip
from mllm_keeplora.data.schema import Media
from mllm_keeplora.errors import UserError
from tests.support.clips import number_of, numbered, packets_of, write_clip

FAST = {"movflags": "faststart"}  # the index before the frames
KINDS = {
    "a.mp4": {},
    "three_between.mp4": {"bf": "3"},
    "a.mkv": {},
    "late.mkv": {"stamps": range(100, 150)},
    "late.mp4": {"stamps": range(100, 150)},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.mov": {},
    "a.avi": {"codec": "mpeg4"},
    "three_between.avi": {"bf": "3"},
    "fragments.mp4": {"muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "many_keys.mp4": {"g": "5"},
    "no_keys.mkv": {"g": "1000"},
    "sound.mp4": {"sound": True},
    "sound.mkv": {"sound": True},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "lossless.mkv": {"codec": "ffv1", "pixels": "bgr0"},
}


def clip(path: Path, start=None, end=None, **options) -> Media:
    return Media("video", path, start=start, end=end, video=VideoOptions(**options))


def seen(media: Media, **options) -> list[int]:
    return [number_of(frame) for frame in read_clip(replace(media, video=VideoOptions(**options))).frames]


@pytest.mark.parametrize("total", range(1, 41))
@pytest.mark.parametrize("sampling", ["linspace", "uniform", "centre"])
def test_frames_are_chosen_as_numpy_does(sampling, total):
    for count in range(1, 17):
        found = chosen([float(k) for k in range(total)], VideoOptions(frames=count, sampling=sampling))
        exact = {
            "linspace": [Fraction(k * (total - 1), max(count - 1, 1)) for k in range(count)],
            "uniform": [Fraction(k * total, count) for k in range(count)],
            "centre": [Fraction((2 * k + 1) * total, 2 * count) for k in range(count)],
        }[sampling]
        assert found == [int(np.floor(each)) for each in exact]
        assert len(found) == count and min(found) >= 0 and max(found) <= total - 1
    if sampling == "linspace" and total >= 16:
        assert found == np.linspace(0, total - 1, 16).astype(int).tolist()


def test_by_time_the_last_frame_shown_at_a_moment_is_taken():
    times = [0, 0.1, 0.2, 0.3, 0.4, 2.4, 4.4]
    by_time = VideoOptions(frames=5, clock="time")
    assert chosen(times, by_time) == [0, 4, 4, 5, 6]  # at 0, 1.1, 2.2, 3.3, 4.4 s
    assert chosen(times, VideoOptions(frames=5)) == [0, 1, 3, 4, 6]


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_every_container_are_those_that_are_asked_for(name, tmp_path):
    media = clip(write_clip(tmp_path / name, **KINDS[name]))
    assert seen(media) == [0, 7, 14, 21, 28, 35, 42, 49]
    assert seen(media, frames=4, sampling="centre") == [6, 18, 31, 43]
    assert seen(media, frames=60)[-2:] == [48, 49]
    found = read_clip(media)
    assert found.times == pytest.approx([0.28 * k for k in range(8)], abs=1e-3)
    assert (found.total, found.rate) == (50, 25.0) and found.seconds == pytest.approx(2.0, abs=0.02)
    assert found.frames.shape == (8, 32, 48, 3) and found.frames.dtype == np.uint8


def test_the_content_decides_and_not_the_suffix(tmp_path):
    assert seen(clip(write_clip(tmp_path / "a.mp4").rename(tmp_path / "a.avi"))) == [0, 7, 14, 21, 28, 35, 42, 49]


def test_a_clip_inside_a_data_file_is_read_from_its_bytes(tmp_path):
    data = write_clip(tmp_path / "a.mp4").read_bytes()
    assert seen(Media("video", Path("row#3"), data=data)) == [0, 7, 14, 21, 28, 35, 42, 49]


def test_a_short_clip_shows_frames_more_than_once(tmp_path):
    media = clip(write_clip(tmp_path / "a.mp4", frames=3))
    assert seen(media) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert seen(clip(write_clip(tmp_path / "b.mp4", frames=1))) == [0] * 8


def test_a_part_of_a_clip_is_told_by_its_seconds_with_both_ends(tmp_path):
    path = write_clip(tmp_path / "a.mkv", stamps=range(100, 150))
    found = read_clip(clip(path, 0.4, 1.0, frames=4))
    assert [number_of(frame) for frame in found.frames] == [10, 15, 20, 25]
    assert found.times == pytest.approx([0, 0.2, 0.4, 0.6]) and found.total == 16
    assert seen(clip(path, start=1.8), frames=2) == [45, 49]
    assert seen(clip(path, end=0.2), frames=2) == [0, 5]


@pytest.mark.parametrize(("start", "end"), [(2.5, None), (0.0, 3.0), (1.0, 1.0), (1.5, 0.5), (-1.0, 1.0)])
def test_a_part_that_a_clip_does_not_have_is_refused(start, end, tmp_path):
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read: .* to .* s is asked of it, and it lasts 2\.00 s"):
        read_clip(clip(write_clip(tmp_path / "a.mp4"), start, end))


def test_frames_are_made_small_by_their_longest_side(tmp_path):
    path = write_clip(tmp_path / "a.mp4", size=(96, 64))
    found = read_clip(clip(path, max_side=48)).frames
    assert found.shape == (8, 32, 48, 3) and [number_of(frame) for frame in found] == [0, 7, 14, 21, 28, 35, 42, 49]


def test_a_clip_is_turned_as_its_container_says(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=2)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # behind version, times, number, duration, layer, volume
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # a quarter to the right, as of a phone held upright
    data[matrix : matrix + 36] = b"".join(each.to_bytes(4, "big", signed=True) for each in quarter)
    path.write_bytes(data)
    upright = read_clip(clip(path, frames=2)).frames
    assert upright.shape == (2, 48, 32, 3)
    assert [number_of(np.rot90(frame)) for frame in upright] == [0, 1]


def cut(path: Path, packet: int, share: float) -> Path:
    """Cut a file within one of its packets, or at its end."""
    place, size = packets_of(path)[packet]
    path.write_bytes(path.read_bytes()[: place + int(size * share)])
    return path


def damaged(path: Path) -> Path:
    """Overwrite what lies between two packets with noise."""
    data, places = bytearray(path.read_bytes()), packets_of(path)
    first, last = places[20][0], places[30][0]
    data[first:last] = np.random.default_rng(0).integers(0, 256, last - first, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    return path


def picture_as(path: Path) -> Path:
    Image.new("RGB", (20, 20)).save(path, "PNG")
    return path


def text_as(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


CUT_OFF = r"ends after (0\.9|1\.0). of 2\.00 s, cut off"
BROKEN = {
    "at a packet's end, mp4": (lambda at: cut(write_clip(at / "a.mp4", muxer=FAST), 24, 1),
                               "holds 25 of the 50 frames that its header promises"),
    "within a packet, mp4": (lambda at: cut(write_clip(at / "a.mp4", muxer=FAST), 24, 0.5), "holds 25 of the 50"),
    "at a packet's end, mkv": (lambda at: cut(write_clip(at / "a.mkv"), 24, 1), CUT_OFF),
    "within a packet, mkv": (lambda at: cut(write_clip(at / "a.mkv"), 24, 0.5), CUT_OFF),
    "cut webm": (lambda at: cut(write_clip(at / "a.webm", codec="libvpx-vp9"), 24, 1), "cut off"),
    "damaged": (lambda at: damaged(write_clip(at / "a.mp4", g="5", bf="0")), "decodes to frame 20 of 50"),
    "no index": (lambda at: cut(write_clip(at / "a.mp4"), -1, 1), "ends before its index"),
    "sound alone": (lambda at: write_clip(at / "a.mp4", picture=False, sound=True), "it holds no video stream"),
    "no bytes": (lambda at: text_as(at / "a.mp4", ""), "it has 0 bytes"),
    "text": (lambda at: text_as(at / "a.mp4", "hello\n" * 99), "is none of mov, matroska, avi"),
    "a picture": (lambda at: picture_as(at / "a.mp4"), "is none of mov, matroska, avi"),
    "a list of files": (lambda at: text_as(at / "a.mp4", f"ffconcat version 1.0\nfile {at / 'other.mp4'}\n"),
                        "is none of mov"),
    "a playlist": (lambda at: text_as(at / "a.mp4", f"#EXTM3U\n#EXTINF:1,\n{at / 'other.mp4'}\n"), "is none of mov"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_clip_is_one_sentence_and_gives_no_frame(case, tmp_path):
    write_clip(tmp_path / "other.mp4")
    make, told = BROKEN[case]
    with pytest.raises(
        UserError, match=f"^video {re.escape(str(tmp_path))}/a\\.[a-z0-9]+ cannot be read: .*{told}"
    ) as error:
        read_clip(clip(make(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_clip_that_lies_elsewhere_is_refused_as_a_picture_is(tmp_path):
    write_clip(tmp_path / "Clip One.mp4")
    with pytest.raises(UserError, match=r"video 'clip one\.mp4' does not exist in .*; there is 'Clip One\.mp4'"):
        read_clip(Media("video", tmp_path / "clip one.mp4", tmp_path))
    with pytest.raises(UserError, match=r"video '.*Clip One\.mp4' leaves the data folder"):
        read_clip(Media("video", tmp_path / "data/../Clip One.mp4", tmp_path / "data"))


def test_bits_that_flip_are_told_and_not_concealed(tmp_path):
    path = write_clip(tmp_path / "a.mp4", g="10", bf="0", muxer=FAST)
    whole, places, rng = path.read_bytes(), packets_of(path), np.random.default_rng(1)
    every, told = clip(path, frames=50), 0
    for _ in range(40):
        data = bytearray(whole)
        place, size = places[rng.integers(len(places))]
        for _ in range(3):
            data[place + 5 + rng.integers(max(1, size - 5))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            read_clip(every)
        except UserError:
            told += 1
    assert told >= 36  # decoders that conceal tell half of them


def test_a_rate_that_varies_is_told_with_where_its_frames_come_from(tmp_path):
    stamps = [*range(11), *range(35, 160, 25)]  # 11 frames in 0.4 s, then one a second
    media = clip(write_clip(tmp_path / "a.mp4", frames=len(stamps), stamps=stamps))
    assert seen(media, frames=4, clock="time") == [0, 11, 13, 15]  # at 0, 1.8, 3.6, 5.4 s
    assert is_irregular(media) and not is_irregular(clip(write_clip(tmp_path / "b.mp4")))


@pytest.fixture
def counted(monkeypatch) -> list[Path]:
    """The clips that are decoded, one entry each time."""
    decoded = []

    def counting(media):
        decoded.append(media.path)
        return read_clip(media)

    monkeypatch.setattr(kept_frames, "read_clip", counting)
    return decoded


def test_kept_frames_are_those_that_were_decoded(counted, tmp_path):
    media = clip(write_clip(tmp_path / "a.mp4"))
    first, second = (FrameCache(1 << 24, tmp_path / "kept").clip(media) for _ in range(2))
    assert len(counted) == 1
    assert np.array_equal(first.frames, second.frames) and first[1:] == second[1:]
    none = FrameCache(0, tmp_path / "none")
    assert np.array_equal(none.clip(media).frames, first.frames) and not (tmp_path / "none").exists()


def test_what_is_asked_otherwise_or_has_changed_is_decoded_anew(counted, tmp_path):
    path, cache = write_clip(tmp_path / "a.mp4"), FrameCache(1 << 24, tmp_path / "kept")
    for media in [clip(path), clip(path, 0.5), clip(path, end=1.5), clip(path, frames=4), clip(path, clock="time")]:
        cache.clip(media)
        cache.clip(media)
    assert len(counted) == 5
    write_clip(path, frames=20)
    assert number_of(cache.clip(clip(path)).frames[-1]) == 19 and len(counted) == 6


def test_a_clip_given_as_pictures_shows_them_in_their_order(tmp_path):
    for number in range(5):
        Image.fromarray(numbered(number)).save(tmp_path / f"{number}.png")
    files = tuple(tmp_path / f"{number}.png" for number in range(5))
    media = Media("video", files[0], tmp_path, files=files, video=VideoOptions(frames=3))
    assert [number_of(frame) for frame in read_clip(media).frames] == [0, 2, 4]
    Image.new("RGB", (9, 9)).save(files[2])
    with pytest.raises(UserError, match=r"the first has 48 x 32 pixels, and .*2\.png has 9 x 9; make them alike"):
        read_clip(media)


def test_damaged_frames_are_made_anew(counted, tmp_path):
    media, cache = clip(write_clip(tmp_path / "a.mp4")), FrameCache(1 << 24, tmp_path / "kept")
    whole = cache.clip(media)
    [file] = (tmp_path / "kept").glob("*/*")
    for damage in (b"", file.read_bytes()[:-5], b"\xff" * 64):
        file.write_bytes(damage)
        again = FrameCache(1 << 24, tmp_path / "kept").clip(media)
        assert np.array_equal(again.frames, whole.frames)
    assert len(counted) == 4


def test_the_room_is_kept_and_what_was_not_used_for_longest_goes_first(counted, tmp_path):
    size = 8 * 32 * 48 * 3
    cache = FrameCache(4 * size, tmp_path / "kept")
    clips = [clip(write_clip(tmp_path / f"{number}.mp4", frames=8 + number)) for number in range(6)]
    for media in (clips[0], clips[1], clips[0], clips[2], clips[3]):
        cache.clip(media)
        time.sleep(0.02)  # file systems note the time of a use in ticks
        assert sum(each.stat().st_size for each in (tmp_path / "kept").glob("*/*")) <= 4 * size
    assert len(counted) == 4
    cache.clip(clips[0])
    assert len(counted) == 4
    cache.clip(clips[1])
    assert len(counted) == 5, "the second one had not been used for longest"


def test_a_folder_that_cannot_be_written_costs_a_decoding(counted, tmp_path):
    (tmp_path / "kept").write_text("a file")
    media = clip(write_clip(tmp_path / "a.mp4"))
    assert [len(FrameCache(1 << 24, tmp_path / "kept").clip(media).frames) for _ in range(2)] == [8, 8]
    assert len(counted) == 2
