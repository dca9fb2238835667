"""Data files and pictures that would hang, fill the memory or let something else be read: one sentence, at once."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from mllm_keeplora.data import readers
from mllm_keeplora.data.media.images import Looks, image_size, images_of, read_image
from mllm_keeplora.data.media.pictures import FORMATS, MOST_PIXELS
from mllm_keeplora.data.readers import digest, read_test, read_train
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.system import given

TALK = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "red"}]}


def refusal(path: Path, read=read_train) -> str:
    with pytest.raises(UserError) as caught:
        list(read(path, path.parent))
    told = str(caught.value)
    assert len(told) < 2000
    return told


def picture(size=(4, 3), form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (250, 0, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def fault(media: Media) -> str:
    """The sentence of `check`, which is that of a run but for the record."""
    record = Record("r", (media,), (Turn("user", "?"),), origin="train.json record 3")
    [told] = Looks().faults([record])
    with pytest.raises(UserError) as caught:
        images_of(record)
    assert str(caught.value) == told and told.startswith("train.json record 3: ")
    return told


# -- data files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
def test_a_pipe_or_a_device_is_no_data_file(ending, tmp_path):
    path = tmp_path / f"train{ending}"
    os.mkfifo(path)
    assert refusal(path) == f"{path} is a pipe, not a file"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert refusal(path, read_test) == f"{path} is a device, not a file"
    with pytest.raises(UserError, match="is a device, not a file"):
        digest(path)


def test_a_line_that_does_not_end_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(given, "MOST_RECORD", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps(TALK) + "\n" + json.dumps({**TALK, "id": "a" * 1000}) + "\n")
    assert "line 2: it is longer than" in refusal(tmp_path / "a.jsonl")


def test_a_record_of_an_array_that_does_not_end_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(given, "MOST_RECORD", 1000)
    monkeypatch.setattr(readers, "CHUNK", 100)
    (tmp_path / "a.json").write_text(f'[{json.dumps(TALK)}, "{"a" * 5000}')
    assert "record 1: it is longer than" in refusal(tmp_path / "a.json")


def test_long_files_of_short_records_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(given, "MOST_RECORD", 1000)
    (tmp_path / "a.json").write_text(" " * 100_000 + json.dumps([TALK] * 100) + "\n" * 100_000)
    (tmp_path / "a.jsonl").write_text((json.dumps(TALK) + "\n") * 100)
    assert len(read_train(tmp_path / "a.json", tmp_path)) == len(read_train(tmp_path / "a.jsonl", tmp_path)) == 100


@pytest.mark.parametrize("depth", [200, 100_000])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_records_that_are_too_deep_are_refused(ending, depth, tmp_path):
    text = json.dumps({**TALK, "more": 0}).replace("0", "[" * depth + "]" * depth)
    (tmp_path / f"a{ending}").write_text(f"[{text}]" if ending == ".json" else text)
    assert "nested more than 100 deep" in refusal(tmp_path / f"a{ending}")


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_number_of_thousands_of_digits_is_no_traceback(ending, tmp_path):
    (tmp_path / f"a{ending}").write_text(f'[{{"id": {"9" * 5000}}}]')
    assert "4300 digits" in refusal(tmp_path / f"a{ending}")


@pytest.mark.parametrize("change", [{"id": "\ud800"}, {"conversations": [{**TALK["conversations"][0], "value": "\udc00"}, TALK["conversations"][1]]}])  # fmt: skip # noqa: E501
def test_half_a_character_is_refused_with_its_record(change, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([TALK, {**TALK, **change}]))
    assert "record 1: half a character" in refusal(tmp_path / "a.json")


def test_a_fault_is_no_longer_than_a_sentence(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{**TALK, "conversations": [{"from": "x" * 100_000, "value": 1}]}]))
    assert len(refusal(tmp_path / "a.json")) < 1500


def test_few_rows_of_a_table_are_held_where_one_may_be_large(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    rows = [{**TALK, "more": "a" * 1000} for _ in range(50)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    sizes, whole = [], parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, batch_size, **how: sizes.append(batch_size) or whole(self, batch_size, **how))  # fmt: skip # noqa: E501
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    for most in (1 << 28, 10_000, 1):
        monkeypatch.setattr(readers, "MOST_TABLE", most)
        assert len(list(readers._parquet_rows(tmp_path / "a.parquet"))) == 50
    assert sizes[0] == 256 and 1 <= sizes[1] < 10 and sizes[2] == 1


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"PAR1" + data[50:], lambda data: b""])
def test_a_damaged_table_is_told_in_a_sentence(spoil, tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    parquet.write_table(pyarrow.Table.from_pylist([TALK] * 9), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(spoil((tmp_path / "a.parquet").read_bytes()))
    assert "is not readable parquet" in refusal(tmp_path / "a.parquet")


def test_a_saved_folder_whose_offsets_lead_out_of_the_file_is_refused(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    Dataset.from_list([{"question": "?", "answer": "red" * n} for n in range(1, 9)]).save_to_disk(str(tmp_path / "a"))
    [arrow] = (tmp_path / "a").glob("*.arrow")
    offsets = struct.pack("<3i", 0, 3, 9)
    data = arrow.read_bytes()
    assert data.count(offsets) == 1
    arrow.write_bytes(data.replace(offsets, struct.pack("<3i", 0, 1 << 30, 9)))
    assert "was not saved by `datasets`" in refusal(tmp_path / "a")


@pytest.mark.parametrize("state", ["[]", "null", '{"_data_files": 3}', "{}", '{"_data_files": [{"filename": 1}]}'])
def test_a_saved_folder_with_a_spoilt_state_is_refused(state, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    Dataset.from_list([{"question": "?", "answer": "red"}]).save_to_disk(str(tmp_path / "a"))
    (tmp_path / "a" / "state.json").write_text(state)
    assert "was not saved by `datasets`" in refusal(tmp_path / "a")


# -- pictures ----------------------------------------------------------------------------------------------------


def test_every_listed_format_is_read(tmp_path):
    for form in FORMATS:
        assert read_image(Media("image", Path("a"), data=picture((32, 32), form))).size == (32, 32), form
    assert len(FORMATS) == 9


@pytest.mark.parametrize("form", ["EPS", "TGA", "ICO", "PCX", "DDS", "SGI", "IM", "PDF"])
def test_a_format_that_is_not_listed_is_refused_with_the_list_and_calls_no_program(form, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("another program"))
    (tmp_path / "a.png").write_bytes(picture((32, 32), form))
    told = fault(Media("image", tmp_path / "a.png", tmp_path))
    assert "a.png cannot be read: it is damaged, or none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000" in told


def with_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is larger."""
    data = picture()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("size", [(8001, 10_000), (13_000, 13_000), (50_000, 50_000), (1, 80_000_001)])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(size, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / "a.png").write_bytes(with_size(*size))
    for media in (Media("image", tmp_path / "a.png", tmp_path), Media("image", Path("a.png"), data=with_size(*size))):
        told = fault(media)
        assert "a.png has" in told and "80,000,000" in told and "make it smaller" in told
        with pytest.raises(UserError, match="80,000,000"):
            image_size(media)


def test_a_picture_of_as_many_pixels_as_are_allowed_has_its_size_told():
    buffer = io.BytesIO()
    Image.new("1", (8000, 10_000)).save(buffer, "BMP")
    assert image_size(Media("image", Path("a"), data=buffer.getvalue())) == (8000, 10_000)


ERRORS = [SyntaxError("x"), struct.error("x"), OverflowError("x"), zlib.error("x"), IndexError("x"), KeyError("x"),
          ZeroDivisionError("x"), RuntimeError("x\ny"), EOFError(), AssertionError(), RecursionError("x")]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_is_one_sentence(error, tmp_path, monkeypatch):
    def fail(self):
        raise error

    (tmp_path / "a.png").write_bytes(picture())
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    told = fault(Media("image", tmp_path / "a.png", tmp_path))
    assert "a.png cannot be read: " in told and "\n" not in told


def test_memory_that_runs_out_is_not_told_as_a_fault_of_the_picture(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        read_image(Media("image", Path("a"), data=picture()))


def test_a_chunk_that_promises_gigabytes_makes_no_room_for_them(tmp_path):
    data = picture()
    (tmp_path / "a.png").write_bytes(data[:33] + struct.pack(">I", 0x7FFFFFFF) + b"zTXt" + data[33:])
    asked = []

    class Counted(given.Handle):
        def read(self, size=-1):
            read = super().read(size)
            asked.append(len(read))
            return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(given, "Handle", Counted)
        assert "cannot be read" in fault(Media("image", tmp_path / "a.png", tmp_path))
    assert sum(asked) < 10_000


def test_deep_pictures_are_scaled_in_parts_as_they_were_at_once(monkeypatch):
    from mllm_keeplora.data.media import shown

    values = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    at_once = np.asarray(read_image(Media("image", Path("a"), data=buffer.getvalue())))
    monkeypatch.setattr(shown, "PART", 4)
    assert (np.asarray(read_image(Media("image", Path("a"), data=buffer.getvalue()))) == at_once).all()
    assert (at_once[..., 0] == np.rint(values / 257)).all()


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "/proc/self/environ", "../a.png", "b/../../a.png", "file:///etc/hostname"]
)
def test_a_name_that_leads_out_of_the_data_folder_is_refused(name, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.png").write_bytes(picture())
    row = {"id": "r", "image": name, **TALK}
    row["conversations"] = [{"from": "human", "value": "<image>?"}, TALK["conversations"][1]]
    (tmp_path / "data" / "a.json").write_text(json.dumps([row]))
    [record] = read_train(tmp_path / "data" / "a.json", tmp_path / "data")
    with pytest.raises(UserError, match="leaves the data folder"):
        images_of(record)


def test_links_inside_the_data_folder_are_followed_but_show_pictures_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(picture())
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    for name, target in (("b.png", "/proc/self/environ"), ("c.png", "/dev/zero"), ("d.png", "/proc/self/fd/0")):
        (tmp_path / "data" / name).symlink_to(target)
    data = tmp_path / "data"
    assert read_image(Media("image", data / "linked" / "a.png", data)).size == (4, 3)
    for name in ("b.png", "c.png", "d.png"):
        assert f"{name}" in fault(Media("image", data / name, data))
    os.mkfifo(data / "e.png")
    assert "'e.png' is no file" in fault(Media("image", data / "e.png", data))


@pytest.mark.parametrize("name", ["a\0.png", "x" * 5000, 3, {"path": "a\0b"}, ""])
def test_a_name_that_no_picture_can_have_is_refused_with_its_record(name, tmp_path):
    row = {
        "id": "r",
        "image": name,
        "conversations": [{"from": "human", "value": "<image>?"}, TALK["conversations"][1]],
    }
    (tmp_path / "a.json").write_text(json.dumps([TALK, row]))
    assert "record 1: " in refusal(tmp_path / "a.json")


def test_the_list_of_formats_is_the_one_that_is_documented():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert ", ".join(FORMATS) in text and f"{MOST_PIXELS:,}" in text
    for limit in (given.MOST_RECORD, given.MOST_REFERENCES):
        assert f"{limit >> 20} MiB" in text
