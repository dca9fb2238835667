"""Ways to spoil an input: its bytes, words, values of JSON or YAML, steps of a pickle, fields of a file's header."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import pickletools
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import yaml

Mutation = Callable[[random.Random, bytes], bytes]

ODD_TEXTS = [
    "", " ", "\0", "\ufeff", "\u202e", "\ud800", "é" * 300, "a" * 5000, "../../x", "/dev/zero", "/proc/self/environ",
    "\x1b[2J", "<script>alert(1)</script>", "=HYPERLINK(1)", "nan", "inf", "1e999", "null", "<image>" * 3, "{{ x }}",
    "%s%n", "data:,", "a.png\0.txt", "file:///etc/passwd", "💥", "\r\n", "\u2028",
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(10**30), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    [], {}, [[]], [None], {"": None}, [{}], {"a": {"b": [1]}}, [[[[[[[[1]]]]]]]], *ODD_TEXTS,
]  # fmt: skip
ODD_YAML = [
    "2024-01-01", "2024-01-01T00:00:00Z", "12:30:45", "1:30.5", "010", "0o17", "0x1F", "0b11", "1_000", ".nan", ".inf",
    "-.inf", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!int ''", "!!float x", "!!bool x",
    "!!null x", "!!timestamp x", "!!python/object:os.system {}", "!x y", "&a [*a]", "*missing", "<<: {a: 1}",
    "{<<: [1]}", "? [a]", "9" * 5000, "{a: 1, a: 2}", "yes", "~", "|", ">", "@", "`", "%", "[" * 2000, "{a: " * 2000,
    "- " * 2000, '"\\ud800"', '"\\0"', "1e5000", "0x" + "f" * 9000,
]  # fmt: skip
ODD_STEPS = [  # of a pickle: numbers and texts without end, places far out, what it asks for, odd bases of a value
    b"\x8a\xff" + b"\xff" * 255, b"\x8b\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f", b"X\xff\xff\xff\xff",
    b"\x95" + b"\xff" * 7 + b"\x7f", b"r\x00\x00\x00\x03", b"r\xff\xff\xff\x7f", b"cnumpy\nndarray\n",
    b"cnumpy\ndtype\n", b"cos\nsystem\n", b"cbuiltins\neval\n", b"N", b"]", b"}", b")", b"\x85", b"R", b"b", b"0", b"2",
    b"\x81", b"K\xff", b"J\xff\xff\xff\xff", b"G\x7f\xf8\0\0\0\0\0\0", b"X\x02\0\0\0V8", b"X\x01\0\0\0O", b"(", b"t",
    b"u", b"e", b"s", b"h\x00", b"h\x01", b"h\x05", b"I" + b"9" * 6000 + b"\n", b"P1\n", b"Q", b"\x82\x01",
]  # fmt: skip
ENDS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\r", b"\n", b'"', b"[", b"{",
    b"\\ud800",
]  # fmt: skip


def flip(rng: random.Random, data: bytes) -> bytes:
    """Change some single bytes."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def drop(rng: random.Random, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    return data[:start] + data[stop:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 50)) + data[stop:]


def insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:place] + rng.choice(ENDS) * rng.choice((1, 1, 3, 2000)) + data[place:]


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, len(data))))


BYTES: list[Mutation] = [flip, flip, cut, drop, repeat, insert]


def changed_value(rng: random.Random, value: Any) -> Any:
    """Change one place of nested values: another value there, a key renamed, left out or doubled, a level more."""
    root = [copy.deepcopy(value)]
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = rng.randrange(7)
    if kind == 0 and isinstance(holder, dict):
        holder[rng.choice(ODD_TEXTS)] = holder.pop(key)
    elif kind == 1 and holder is not root:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif kind == 3:
        for _ in range(rng.choice((1, 3, 60, 150))):
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    elif kind == 4:
        holder[key] = _otherwise(rng, holder[key])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return root[0]


def _otherwise(rng: random.Random, value: Any) -> Any:
    """Give the same value as another type."""
    if isinstance(value, str):
        return rng.choice(
            [[value], {value[:9]: value}, len(value), None, value + rng.choice(ODD_TEXTS), value.encode().hex()]
        )
    if isinstance(value, bool | int | float):
        return rng.choice([str(value), [value], None, -value, value * 10**6, value + 0.5, 10**5000])
    if isinstance(value, list):
        return rng.choice([dict(enumerate(map(str, value))), str(value)[:99], len(value), None, value[::-1], value[:1]])
    if isinstance(value, dict):
        return rng.choice([list(value.items()), list(value), str(value)[:99], None, {}])
    return rng.choice(ODD_VALUES)


def json_text(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return json.dumps(value, default=str).encode() if not _has_long(value) else b"[" + b"9" * 6000 + b"]"


def _has_long(value: Any) -> bool:
    return True if not isinstance(value, dict | list) else any(map(_has_long, value))


def in_json(rng: random.Random, data: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = changed_value(rng, value)
    text = json_text(value)
    if rng.random() < 0.05:
        depth = rng.choice((200, 5000, 100_000))
        text = text[: rng.randrange(len(text))] + rng.choice((b"[", b'{"a":')) * depth
    return text


def in_json_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = in_json(rng, lines[place])
    return b"\n".join(lines) + b"\n"


def in_yaml(rng: random.Random, data: bytes) -> bytes:
    """Change values of YAML, or put a scalar, tag, anchor or bomb where a value stood."""
    kind = rng.random()
    if kind < 0.5:
        value = changed_value(rng, yaml.safe_load(data))
        try:
            return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
        except (ValueError, yaml.YAMLError, RecursionError):
            return json_text(value)
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    if kind < 0.55:
        levels = [b"b0: &b0 [lol, lol]"] + [
            b"b%d: &b%d [%s]" % (i, i, b", ".join([b"*b%d" % (i - 1)] * 9)) for i in range(1, 10)
        ]
        return b"\n".join(lines + levels)
    if b":" in lines[place]:
        lines[place] = lines[place].split(b":")[0] + b": " + rng.choice(ODD_YAML).encode()
    else:
        lines[place] = rng.choice(ODD_YAML).encode()
    return b"\n".join(lines)


def in_words(rng: random.Random, data: bytes) -> bytes:
    """Put an odd text where a word stood, or leave a line out, or tell it twice or somewhere else."""
    lines = data.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.append(lines[place])
    elif kind == 2:
        rng.shuffle(lines)
    else:
        words = re.split(rb"([ ,/._]+)", lines[place])
        words[rng.randrange(len(words))] = rng.choice((*ODD_TEXTS, "-1", "0", "9" * 5000)).encode(
            errors="surrogatepass"
        )
        lines[place] = b"".join(words)
    return b"".join(lines)


def in_pickle(rng: random.Random, data: bytes) -> bytes:
    """Leave out a step of a pickle, tell one twice or elsewhere, or put an odd one there."""
    starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    steps = [data[start:stop] for start, stop in itertools.pairwise(starts)]
    place, kind = rng.randrange(len(steps)), rng.randrange(6)
    if kind == 0:
        del steps[place]
    elif kind == 1:
        steps[place] += steps[rng.randrange(len(steps))]
    elif kind == 2:
        other = rng.randrange(len(steps))
        steps[place], steps[other] = steps[other], steps[place]
    elif kind == 3:
        steps[place] = rng.choice(ODD_STEPS)
    elif kind == 4:
        steps.insert(place, rng.choice(ODD_STEPS))
    else:
        steps[place] = (
            steps[place][:1] + flip(rng, steps[place][1:]) if len(steps[place]) > 1 else rng.choice(ODD_STEPS)
        )
    return b"".join(steps)


def in_gzip(rng: random.Random, data: bytes) -> bytes:
    """Change what is compressed, or let it go on for gigabytes."""
    if len(data) > 1 << 16:  # goes on so already
        return flip(rng, data)
    if rng.random() < 0.02:
        return data + gzip.compress(bytes(1 << 28)) * 12
    try:
        whole = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):  # an earlier mutation was here
        return flip(rng, data)
    return gzip.compress(in_picture(rng, whole) if rng.random() < 0.5 else rng.choice(BYTES)(rng, whole))


def in_picture(rng: random.Random, data: bytes) -> bytes:
    """Write odd numbers over 2 or 4 bytes of the first kilobyte: that is where sizes, depths and counts stand."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(max(1, min(len(data), 1024) - 4))
        number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10_000, 30_000, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 24))
        form = rng.choice("<>") + ("I" if number > 0xFFFF or rng.random() < 0.5 else "H")
        packed = struct.pack(form, number)
        changed[place : place + len(packed)] = packed
    return _with_checksums(bytes(changed)) if rng.random() < 0.7 else bytes(changed)


def _with_checksums(data: bytes) -> bytes:
    """Make the checksums of a PNG's chunks right again, so that a changed header is believed."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, place = data[:8], 8
    while place + 12 <= len(data):
        [length] = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        if place + 12 + length > len(data):
            break
        out += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return out + data[place:]


def in_tensors(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file, or its stated length."""
    [length] = struct.unpack("<Q", data[:8])
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 1 << 31, 1 << 62, 2**64 - 1))) + data[8:]
    header = in_json(rng, data[8 : 8 + length].strip())
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


KINDS: dict[str, list[Mutation]] = {
    "bytes": BYTES,
    "json": [in_json] * 12 + BYTES,
    "lines": [in_json_lines] * 12 + BYTES,
    "yaml": [in_yaml] * 12 + BYTES,
    "picture": [in_picture] * 8 + BYTES,
    "words": [in_words] * 8 + BYTES,
    "pickle": [in_pickle] * 10 + BYTES,
    "header": [in_picture] * 8 + BYTES,
    "gzip": [in_gzip] * 8 + BYTES,
    "tensors": [in_tensors] * 10 + BYTES,
}


def mutated(rng: random.Random, kind: str, data: bytes) -> bytes:
    """Spoil an input in one way that suits its kind; rarely in two."""
    for mutate in rng.choices(KINDS[kind], k=rng.choice((1, 1, 1, 1, 2))):
        try:
            data = mutate(rng, data)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            OverflowError,
            RecursionError,
            AttributeError,
            yaml.YAMLError,
        ):
            data = flip(rng, data)  # what an earlier mutation has left cannot be parsed any more
    return data
