"""What somebody gave is a regular file of stated size, lines and depth; all else is told in a sentence at once."""

from __future__ import annotations

import io
import os
import socket

import pytest

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import files, given


@pytest.fixture
def places(tmp_path):
    """Files that are none, by what a sentence calls them."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        yield {"pipe": tmp_path / "pipe", "device": "/dev/zero", "folder": tmp_path, "socket": tmp_path / "socket"}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
@pytest.mark.parametrize("read", [given.read_bytes, files.read_json, files.read_lines, files.read_tensors])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(kind, read, places):
    with pytest.raises(UserError, match=r"is a (pipe|device|folder), not a file|cannot be read: No such device"):
        read(places[kind])


def test_a_file_that_is_too_large_is_refused_with_its_size_and_the_limit(tmp_path):
    with open(tmp_path / "large.json", "wb") as handle:
        handle.truncate(given.MOST_JSON + 1)  # takes no room on the disk
    with pytest.raises(UserError, match=r"large.json has 16,777,217 bytes; at most 16,777,216 are read"):
        files.read_json(tmp_path / "large.json")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_told(name, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read|is missing"):
        given.opened(tmp_path / name)


def test_a_line_without_end_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(given, "MOST_RECORD", 1000)

    class Endless(io.StringIO):
        asked = 0

        def readline(self, size=-1):
            assert 0 < size <= 1001
            self.asked += size
            return "a" * size

    endless = Endless()
    with pytest.raises(ValueError, match="line 1: it is longer than"):
        list(given.lines(endless))
    assert endless.asked <= 1001


@pytest.mark.parametrize("depth", [given.DEEPEST + 1, 5_000, 100_000])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_json_that_is_too_deep_is_refused(depth, bracket):
    end = {"[": "]", '{"a":': "}"}[bracket]
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        given.from_json(bracket * depth + "1" + end * depth)


def test_json_of_the_allowed_depth_is_read_however_many_brackets_it_has():
    value = given.from_json("[" * given.DEEPEST + "]" * given.DEEPEST)
    assert value and given.from_json("[" + "[]," * 1000 + "[]]") == [[]] * 1001


def test_a_number_of_thousands_of_digits_is_refused():
    with pytest.raises(ValueError, match="4300 digits"):
        given.from_json("9" * 5000)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"', "[{}]"])
def test_a_file_of_ours_that_holds_no_keys_is_damaged(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"the whole must hold keys and values, got .*a.json"):
        files.read_json(tmp_path / "a.json", files.OBJECT)


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\udfff": 1}'])
def test_half_a_character_is_refused_since_it_could_not_be_written_again(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="half a character"):
        files.read_json(tmp_path / "a.json")


def test_a_header_that_promises_more_than_the_file_holds_makes_no_room_for_it(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with given.opened(tmp_path / "a") as handle:
        assert handle.read(1 << 62) == b"abc"


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "\x1b[2J", "x" * 256, "ä" * 128, "a/" * 2001, "\x7f"])
def test_a_path_that_no_file_system_takes_is_refused(text):
    with pytest.raises(ValueError, match="may"):
        given.as_path(text)


@pytest.mark.parametrize("text", ["runs/über", "/data/a b/c.json", "x" * 255, "../up"])
def test_a_path_that_file_systems_take_stays_as_it_is(text):
    assert given.as_path(text) == text


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused_since_it_could_not_be_written_again(number, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(UserError, match="a number in it is not finite"):
        files.read_json(tmp_path / "a.json")
