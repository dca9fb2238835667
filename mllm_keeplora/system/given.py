"""Files as somebody gave them: regular ones alone, read no further than is stated here. Every reader opens them so.

A pipe or a device would be waited for; a file, a line or a nesting without end would fill the memory.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mllm_keeplora.errors import UserError, shortened

MOST_YAML = 1 << 20  # bytes of a YAML file
MOST_JSON = 1 << 24  # bytes of a JSON file that is read as a whole, other than gold answers kept apart
MOST_REFERENCES = 1 << 28  # bytes of those
MOST_RECORD = 1 << 26  # characters of a line of JSON lines, and of a record of a JSON array
CHUNK = 1 << 20  # bytes that are asked for without a look at how many there are
DEEPEST = 100  # lists and mappings inside one another, in JSON and in YAML

NAME = r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,99}$"  # of a domain, suite or unit: files are called so, with endings
MOST_PATH, MOST_PART = 4000, 255  # bytes of a path, and of a name in it, that file systems take

TOO_DEEP = f"it is nested more than {DEEPEST} deep"
TOO_LONG = f"it is longer than {MOST_RECORD:,} characters"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def as_path(text: str) -> str:
    """Give a path back that a file system can take.

    Raises:
        ValueError: it holds control characters, or it or a name in it is too long.
    """
    if any(ord(each) < 32 or ord(each) == 127 for each in text):
        raise ValueError("may not hold control characters")
    data = text.encode(errors="surrogateescape")
    if len(data) > MOST_PATH or any(len(part) > MOST_PART for part in data.split(b"/")):
        raise ValueError(f"may have at most {MOST_PART} bytes in a name and {MOST_PATH:,} in all")
    return text


class Handle(io.BufferedReader):
    """Makes no room for more than the file holds, whatever a header of it promises."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > CHUNK:
            size = min(size, max(CHUNK, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def opened(path: Path, most: int | None = None) -> BinaryIO:
    """Open a regular file of at most so many bytes.

    Raises:
        UserError: it is missing, something else than a file, larger, or has a name that no file can have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {error.strerror}") from None
    except (OSError, ValueError) as error:
        told = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{shortened(path)} cannot be read: {told}") from None
    status, fault = os.fstat(descriptor), None
    if not stat.S_ISREG(status.st_mode):
        fault = f"is {KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, not a file"
    elif most is not None and status.st_size > most:
        fault = f"has {status.st_size:,} bytes; at most {most:,} are read"
    if fault is not None:
        os.close(descriptor)
        raise UserError(f"{path} {fault}")
    return Handle(io.FileIO(descriptor))


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """Read a file of at most so many bytes; UserErrors are those of `opened`."""
    with opened(path, most) as handle:
        return handle.read(most)


def as_text(data: bytes) -> str:
    """Decode UTF-8, without a mark of byte order; a ValueError if it is none."""
    return data.decode("utf-8-sig")


def half_character(text: str) -> str:
    """Find half a character (a lone surrogate), which no file and no tokeniser takes; nothing of a whole text."""
    return "" if text.isascii() else next((each for each in text if "\ud800" <= each <= "\udfff"), "")


def lines(handle: TextIO) -> Iterator[str]:
    """Yield the lines of a text, cut at line feeds alone, without holding more than one.

    Raises:
        ValueError: one is too long.
    """
    number = 0
    while line := handle.readline(MOST_RECORD + 1):
        number += 1
        if len(line) > MOST_RECORD:
            raise ValueError(f"line {number}: {TOO_LONG}")
        yield line


def json_lines(handle: TextIO) -> Iterator[Any]:
    """Yield the values of JSON lines; a ValueError tells the line that holds none."""
    for number, line in enumerate(lines(handle), start=1):
        if line.strip():
            try:
                value = from_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {why(error)}") from None
            yield value


def from_json(text: str | bytes) -> Any:
    """Parse JSON that is not too deep.

    Raises:
        ValueError: it is, or is no JSON in UTF-8, or has a number that is too long.
    """
    text = as_text(text) if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if is_deep(value, text.count("[") + text.count("{")):
        raise ValueError(TOO_DEEP)
    return value


def is_deep(value: Any, brackets: int) -> bool:
    """Tell whether a value is nested too deep, given how many brackets it was opened with."""
    level = [value] if brackets > DEEPEST else []
    for _ in range(DEEPEST):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def why(error: ValueError) -> str:
    """Say in few words what is wrong with a text that was to be JSON."""
    said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return said.partition(";")[0]
