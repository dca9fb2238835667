"""MATLAB files of version 5, as far as published data sets have them: numbers, texts, cells and structs.

Read here, since scipy's reader writes beyond its memory at some damaged ones. Source: MathWorks, "MAT-File Format".
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

HEADER = 128  # bytes, of which the last two say the order of bytes
ORDERS = {b"IM": "<", b"MI": ">"}
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
ENCODINGS = {1: "latin1", 2: "latin1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
MATRIX, COMPRESSED = 14, 15  # elements that hold others
CELL, STRUCT, TEXT, NUMERIC = 1, 2, 4, range(6, 16)  # classes of arrays


def variable(data: bytes, name: str, most: int) -> list[Any]:
    """Give the values of one variable: numbers, a text, what its cells hold, or a dictionary for each struct.

    Args:
        data: the file.
        name: of the variable.
        most: bytes that a compressed variable may have.

    Raises:
        KeyError: there is none of that name.
        ValueError, struct.error, zlib.error, RecursionError: the file is damaged.
    """
    if (order := ORDERS.get(data[HEADER - 2 : HEADER])) is None:
        raise ValueError("it has no header of version 5")
    rest = memoryview(data)[HEADER:]
    while rest:
        kind, content, rest = _element(rest, order)
        if kind == COMPRESSED:
            unpacking = zlib.decompressobj()
            unpacked = unpacking.decompress(content, most)
            if unpacking.unconsumed_tail:
                raise ValueError(f"a variable has more than {most:,} bytes")
            kind, content, _ = _element(memoryview(unpacked), order)
        if kind != MATRIX:
            raise ValueError(f"it has an element of kind {kind}, which is no variable")
        found, values = _array(content, order, name)
        if found == name:
            return values
    raise KeyError(name)


def _element(data: memoryview, order: str) -> tuple[int, memoryview, memoryview]:
    """Take the first element off: its kind, its content, and what follows."""
    [kind] = struct.unpack_from(f"{order}I", data)
    if kind >> 16:  # a small one, which lies in its own tag
        kind, size, start, stop = kind & 0xFFFF, kind >> 16, 4, 8
    else:
        [size] = struct.unpack_from(f"{order}I", data, 4)
        start, stop = 8, 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)
    if start + size > min(stop, len(data)):
        raise ValueError("it is cut off")
    return kind, data[start : start + size], data[stop:]


def _array(data: memoryview, order: str, wanted: str | None = None) -> tuple[str, list[Any]]:
    """Give the name and the values of an array; no values where it is another one than is wanted."""
    if not data:
        return "", []
    _, flags, data = _element(data, order)
    _, sizes, data = _element(data, order)
    _, name, data = _element(data, order)
    kind, name = struct.unpack_from(f"{order}I", flags)[0] & 0xFF, str(name, "latin1")
    if wanted is not None and name != wanted:
        return name, []
    count = math.prod(struct.unpack(f"{order}{len(sizes) // 4}I", sizes))
    if kind == CELL:
        cells = _arrays(data, order)
        return name, [next(cells) for _ in range(count)]
    if kind == STRUCT:
        _, length, data = _element(data, order)
        _, fields, data = _element(data, order)
        step = struct.unpack_from(f"{order}I", length)[0]
        named = [str(fields[at : at + step], "latin1").partition("\0")[0] for at in range(0, len(fields), step)]
        cells = _arrays(data, order)
        return name, [{field: next(cells) for field in named} for _ in range(count if named else 0)]
    stored, content, _ = _element(data, order)
    if kind == TEXT and stored in ENCODINGS:
        encoding = ENCODINGS[stored]
        ending = {"<": "-le", ">": "-be"}[order] if encoding in ("utf-16", "utf-32") else ""
        return name, [str(content, encoding + ending)]
    if kind not in NUMERIC or stored not in NUMBERS:
        raise ValueError(f"it has values of kind {kind}, stored as {stored}")
    import numpy as np

    values = np.frombuffer(content, order + NUMBERS[stored]).tolist()
    if len(values) != count:
        raise ValueError(f"it has {len(values)} values where {count} belong")
    return name, values


def _arrays(data: memoryview, order: str) -> Iterator[list[Any]]:
    """Yield the values of arrays that stand in another one, as many as are asked for."""
    while True:
        kind, content, data = _element(data, order)
        if kind != MATRIX:
            raise ValueError(f"it has an element of kind {kind} where an array belongs")
        yield _array(content, order)[1]
