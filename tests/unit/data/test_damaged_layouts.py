"""Published files that would end the process, fill the memory or leave a traceback are refused in a sentence."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import pickletools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from mllm_keeplora.checks.classes import prompt_faults
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.layouts import matlab, packed, published, published_rows
from mllm_keeplora.data.naming import ClassFile, list_faults, make_naming
from mllm_keeplora.data.readers import read_published
from mllm_keeplora.errors import UserError
from tests.support.mtil_trees import TREES

MOST = 1 << 20


def refusal(layout, folder, split="train"):
    with pytest.raises(UserError) as told:
        list(published_rows(layout, folder, split))
    assert len(str(told.value)) < 500
    return str(told.value)


def mat(values, **options) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, values, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("packs", [False, True])
def test_a_matlab_file_is_read_as_scipy_reads_it(packs):
    kinds = [("class", object), ("fname", object)]
    values = {
        "numbers": np.arange(300, dtype=np.float64)[None],
        "bytes": np.arange(9, dtype=np.uint8)[None],
        "one": [[7]],
        "halves": np.array([[0.5, -2.0]], np.float32),
        "cells": np.array(["a", "größe", ""], object),
        "rows": np.array([(1, "00001.jpg"), (2, "b.jpg")], dtype=kinds),
    }
    data = mat(values, do_compression=packs)
    expected = loadmat(io.BytesIO(data), squeeze_me=True)
    for name in ("numbers", "bytes", "one", "halves"):
        assert matlab.variable(data, name, MOST) == np.atleast_1d(expected[name]).tolist()
    assert matlab.variable(data, "cells", MOST) == [["a"], ["größe"], [""]]
    assert matlab.variable(data, "rows", MOST) == [
        {"class": [1], "fname": ["00001.jpg"]},
        {"class": [2], "fname": ["b.jpg"]},
    ]
    with pytest.raises(KeyError):
        matlab.variable(data, "other", MOST)


def element(kind: int, content: bytes) -> bytes:
    return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)


def array(kind: int, sizes: tuple[int, int], content: bytes) -> bytes:
    """A file of the other order of bytes, with one variable."""
    inside = element(6, struct.pack(">II", kind, 0)) + element(5, struct.pack(">II", *sizes))
    inside += struct.pack(">I", 1 << 16 | 1) + b"x\0\0\0" + content
    return bytes(124) + b"\x01\x00MI" + element(14, inside)


def test_a_matlab_file_of_the_other_order_of_bytes_is_read():
    assert matlab.variable(array(6, (1, 2), element(9, struct.pack(">dd", 1, 2.5))), "x", MOST) == [1, 2.5]
    assert matlab.variable(array(4, (1, 2), element(4, "ab".encode("utf-16-be"))), "x", MOST) == ["ab"]


@pytest.mark.parametrize(
    ("kind", "sizes", "content", "told"),
    [
        (6, (1, 2), element(9, struct.pack(">d", 1)), "it has 1 values where 2 belong"),
        (6, (1, 1), struct.pack(">II", 9, 1 << 30) + bytes(8), "it is cut off"),
        (6, (1, 1), struct.pack(">I", 9 << 16 | 9) + bytes(8), "it is cut off"),
        (1, (1, 1), element(9, bytes(8)), "an element of kind 9 where an array belongs"),
        (1, (1 << 31, 1 << 31), element(14, b""), "unpack_from requires"),
        (17, (1, 1), element(9, bytes(8)), "values of kind 17, stored as 9"),
    ],
)
def test_an_array_that_is_not_put_together_rightly_is_refused(kind, sizes, content, told):
    with pytest.raises((ValueError, struct.error), match=told):
        matlab.variable(array(kind, sizes, content), "x", MOST)


def test_structs_without_fields_take_no_time_and_room():
    empty = element(5, struct.pack(">I", 8)) + element(1, b"")
    assert matlab.variable(array(2, (1 << 20, 1), empty), "x", MOST) == []


def test_no_change_of_a_matlab_file_is_more_than_refused():
    kinds = [("class", object), ("fname", object)]
    data = mat({"x": np.array([(1, "00001.jpg")], dtype=kinds), "y": [[1, 2, 3]]})
    for place in range(126, len(data)):
        for value in (0x00, 0x7F, 0xFF):
            for stop in (place + 1, place + 2):
                spoilt = data[:place] + bytes([value]) * (stop - place) + data[stop:]
                for name in "xy":
                    with contextlib.suppress(KeyError, ValueError, struct.error, RecursionError):
                        assert isinstance(matlab.variable(spoilt, name, MOST), list)


def test_a_variable_that_is_unpacked_without_end_is_refused():
    data = mat({"x": np.zeros((1, 99))})[:128]
    packed_up = zlib.compress(bytes(1 << 22))
    data += (15).to_bytes(4, "little") + len(packed_up).to_bytes(4, "little") + packed_up
    with pytest.raises(ValueError, match="more than 1,048,576 bytes"):
        matlab.variable(data, "x", MOST)


@pytest.mark.parametrize("labels", [[[1.5, 2.0]], [[float("nan"), 1.0]], [[float("inf")]], np.array(["a"], object)])
def test_numbers_of_pictures_are_whole(labels, tmp_path):
    TREES["Flowers"][0](tmp_path)
    folder = tmp_path / "flowers-102"
    savemat(folder / "imagelabels.mat", {"labels": labels})
    assert refusal("flowers102", folder) == f"{folder / 'imagelabels.mat'}: labels must hold whole numbers"


@pytest.mark.parametrize("row", [("x", "a.jpg"), (1.5, "a.jpg"), (1, 3), (np.array([1, 2]), "a.jpg")])
def test_annotations_of_cars_have_a_number_and_a_name(row, tmp_path):
    TREES["StanfordCars"][0](tmp_path)
    path = tmp_path / "stanford_cars/devkit/cars_train_annos.mat"
    savemat(path, {"annotations": np.array([row], dtype=[("class", object), ("fname", object)])})
    assert refusal("stanford_cars", tmp_path / "stanford_cars") == f"{path}: an annotation has no `class` and `fname`"


@pytest.fixture
def cifar(tmp_path):
    TREES["CIFAR100"][0](tmp_path)
    return tmp_path / "cifar-100-python"


@pytest.mark.parametrize("by", ["Python 2", "C", "F"])
def test_pixels_are_those_that_were_pickled(by, cifar):
    pixels = np.asarray(np.arange(2 * 3072).reshape(2, 3072) % 256, np.uint8, order="F" if by == "F" else "C")
    data = pickle.dumps({"data": pixels, "fine_labels": [0, 1]}, 4)
    if by == "Python 2":  # whose bytes are text
        kind = b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        begin = b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR"
        state = (
            b"(K\x01(K\x02M\x00\x0ct" + kind + b"\x89T" + pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tb"
        )
        data = begin + state + b"U\x0bfine_labels](K\0K\x01eu."
    (cifar / "train").write_bytes(data)
    rows = [image for image, _ in published("cifar100", cifar, "train").rows]
    np.testing.assert_array_equal(np.array(rows), pixels.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1))


def test_an_array_of_pointers_is_never_built(cifar):
    """A dtype takes its fields and flags from a pickle: bytes could be told to be objects, which end the process."""
    data = pickle.dumps({"data": np.zeros((1, 3072), np.dtype([("a", "V8")])), "fine_labels": [0]}, 4)
    (cifar / "train").write_bytes(data)
    assert "an array of something else than bytes" in refusal("cifar100", cifar)


@pytest.mark.parametrize("step", [b"r\0\0\0\1", b"\x96" + (1 << 40).to_bytes(8, "little")])
def test_a_pickle_gets_no_more_room_than_it_fills(step, cifar):
    (cifar / "train").write_bytes(b"\x80\x05}" + step + b".")
    tracemalloc.start()
    try:
        assert "train is not a readable pickle of CIFAR100" in refusal("cifar100", cifar)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_tuples_that_hold_one_another_are_not_followed(cifar):
    nested = b"\x80\x02}X\x0b\0\0\0fine_labels]N" + b"2\x86" * 60 + b"as."
    assert pickletools.dis(nested, io.StringIO()) is None  # well formed
    (cifar / "train").write_bytes(nested)
    assert "it is not put together as the data set is" in refusal("cifar100", cifar)


@pytest.mark.parametrize("names", [["apple", 7], ["apple", None]])
def test_classes_of_cifar_are_texts(names, cifar):
    (cifar / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
    assert refusal("cifar100", cifar) == f"{cifar / 'meta'}: fine_label_names must be texts"


def test_a_label_that_is_no_number_is_told_by_its_kind(cifar):
    values = {"data": np.zeros((1, 3072), np.uint8), "fine_labels": [["a"]]}
    (cifar / "train").write_bytes(pickle.dumps(values, 4))
    assert refusal("cifar100", cifar) == f"{cifar / 'train'}: a picture is of class list; there are 2"


def test_a_damaged_stream_of_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    data = bytearray(gzip.compress(bytes(range(256)) * 40))
    data[10:14] = b"\xff" * 4  # begins no block
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"ubyte\.gz cannot be unpacked: "):
        packed._idx(path.with_suffix(""), 3)


@pytest.mark.parametrize("names", [{"soup": [7]}, {"soup": [None]}, {"soup": "a"}, ["soup"]])
def test_lists_of_food_hold_names(names, tmp_path):
    TREES["Food"][0](tmp_path)
    path = tmp_path / "food-101/meta/train.json"
    path.write_text(json.dumps(names))
    assert refusal("food101", tmp_path / "food-101") == f"{path} must map classes to lists of pictures"


def test_half_a_character_in_what_published_files_call_a_class_is_refused(tmp_path):
    TREES["Food"][0](tmp_path)
    (tmp_path / "food-101/meta/train.json").write_text('{"\\ud800": ["a"]}')
    assert "half a character stands in '\\ud800'" in refusal("food101", tmp_path / "food-101")


def test_half_a_character_in_the_name_of_a_folder_is_refused(tmp_path):
    TREES["EuroSAT"][0](tmp_path)
    (tmp_path / "eurosat/2750" / "Stra\udcdfe").mkdir()
    assert "half a character stands in 'Stra\\udcdfe'" in refusal("eurosat", tmp_path / "eurosat/2750")


def test_half_a_character_in_the_name_of_a_picture_is_told_by_its_record(tmp_path):
    TREES["Food"][0](tmp_path)
    folder = tmp_path / "food-101"
    (folder / "meta/train.json").write_text('{"soup": ["\\ud800"]}')
    naming = make_naming(None, ["soup"], None, "?", "test")
    with pytest.raises(UserError, match=r"food-101 record 0: half a character, '\\ud800', stands in a text"):
        read_published("food101", folder, folder, "train", naming)


def test_sentences_about_names_without_end_end():
    long = "a" * 5000
    faults = list(list_faults([long, long, "b", f"{long}b", f"{long}_b", f"{long} b"], [long], "test"))
    faults += make_naming(None, [long], [long], "?", "test").faults
    faults += make_naming(ClassFile(names=[long]), ["other"], None, "?", "test").faults
    faults += prompt_faults(ClassList.of([long], ["a {}"]), lambda texts: {"input_ids": [[0] * 99] * len(texts)}, 77)
    assert len(faults) == 7 and max(map(len, faults)) < 1500


def test_a_compressed_file_is_unpacked_no_further_than_its_header_says(tmp_path):
    header = struct.pack(">4I", 0x0803, 2, 28, 28)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + bytes(1 << 25)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="is not an idx file of bytes with 3 axes, or is cut off"):
            packed._idx(path.with_suffix(""), 3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
