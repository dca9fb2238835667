"""Data sets that keep the pixels of many pictures in one file: CIFAR100's pickles and MNIST's idx files."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import Unpickler
from pickletools import genops
from typing import TYPE_CHECKING, Any, BinaryIO

from mllm_keeplora.data.layouts.published import Published, named
from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import given

if TYPE_CHECKING:
    import numpy as np

MOST_PACKED = 1 << 29  # bytes of a packed file, and of what a compressed one holds
MOST_TUPLES = 20  # in a pickle: an array has three
DIGITS = [str(digit) for digit in range(10)]
IDX_BYTES = 0x08  # the kind of number in an idx file: unsigned bytes


class _Kind:
    """Stands for numpy's dtype: the name alone, whatever state a pickle would give it."""

    def __init__(self, name: Any = None, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Pass over the order of bytes; a dtype of numpy's would take pointers from here, too."""


class _Array:
    """Stands for numpy's array: its shape and bytes."""

    pixels: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Take version, shape, dtype, whether it goes by columns, and the bytes, which Python 2 wrote as text."""
        import numpy as np

        match state:
            case (
                _,
                tuple(shape),
                _Kind(name="u1"),
                bool() | int() as by_columns,
                bytes() | bytearray() | str() as data,
            ):
                data = data.encode("latin1") if isinstance(data, str) else data
                self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")
            case _:
                raise ValueError("it has an array of something else than bytes")


class _Plain(Unpickler):
    """Builds arrays of bytes, lists, dictionaries, numbers and strings; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct": lambda *_: _Array(), "ndarray": _Array, "dtype": _Kind}
        if module not in {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"} or name not in allowed:
            raise UserError(f"it asks for {module}.{name}, which is neither an array nor a plain value")
        return allowed[name]


def cifar100(path: Path, split: str) -> Published:
    """Read CIFAR100, the version for Python, with the fine labels."""
    labels = _plain(path / "meta", "fine_label_names")
    if not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path / 'meta'}: fine_label_names must be texts")

    def rows() -> Iterator[tuple[np.ndarray, str]]:
        file = path / named({"train": "train", "test": "test"}, split)
        values = _plain(file)
        pixels, fine = getattr(values.get("data"), "pixels", None), values.get("fine_labels")
        if pixels is None or not isinstance(fine, list) or pixels.shape != (len(fine), 3 * 32 * 32):
            raise UserError(f"{file} does not hold `data` of n x 3072 bytes and as many `fine_labels`")
        for row, number in zip(pixels, fine, strict=True):
            yield row.reshape(3, 32, 32).transpose(1, 2, 0), _label(labels, number, file)

    return Published(labels, rows())


def mnist(path: Path, split: str) -> Published:
    """Read MNIST: four idx files, compressed or not, in the folder or in its `raw`; the classes are digits."""
    base = path / "raw" if (path / "raw").is_dir() else path
    file = named({"train": "train", "test": "t10k"}, split)

    def rows() -> Iterator[tuple[np.ndarray, str]]:
        pictures, labels = _idx(base / f"{file}-images-idx3-ubyte", 3), _idx(base / f"{file}-labels-idx1-ubyte", 1)
        if len(pictures) != len(labels):
            raise UserError(f"{base}: {len(pictures)} {split} pictures, but {len(labels)} labels")
        for picture, number in zip(pictures, labels.tolist(), strict=True):
            yield picture, _label(DIGITS, number, base)

    return Published(DIGITS, rows())


def as_png(pixels: np.ndarray) -> bytes:
    """Encode pixels without loss."""
    import numpy as np
    from PIL import Image

    told = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(told, "PNG", compress_level=1)
    return told.getvalue()


def _plain(path: Path, key: str | None = None) -> Any:
    """Read a pickled dictionary, or what it has under a key, without building anything but plain values."""
    with given.opened(path, MOST_PACKED) as handle:
        try:
            _refuse_odd_steps(handle)
            handle.seek(0)
            values = _Plain(handle, encoding="latin1").load()
        except Exception as error:  # of whatever kind a damaged pickle raises
            raise UserError(f"{path} is not a readable pickle of CIFAR100: {shortened(first_line(error))}") from None
    if not isinstance(values, dict) or (key is not None and not isinstance(values.get(key), list)):
        raise UserError(f"{path} must hold a dictionary" + (f" with a list {key}" if key else ""))
    return values if key is None else values[key]


def _refuse_odd_steps(handle: BinaryIO) -> None:
    """Refuse a pickle that asks for more room than it fills, or whose tuples hold one another without end."""
    tuples = 0
    for number, (step, value, _) in enumerate(genops(handle)):
        tuples += step.name.startswith("TUPLE")
        if tuples > MOST_TUPLES or ("PUT" in step.name and value > number):  # what is kept is counted from 0 or 1
            raise ValueError("it is not put together as the data set is")


def _idx(path: Path, axes: int) -> np.ndarray:
    """Read an idx file of bytes with so many axes: a header of sizes (big-endian), then the values."""
    import numpy as np

    packed = path.with_name(f"{path.name}.gz")
    source = path if path.is_file() or not packed.is_file() else packed
    start = 4 * (axes + 1)
    with given.opened(source, MOST_PACKED) as handle:
        try:
            unpacked = handle if source == path else gzip.GzipFile(fileobj=handle)
            data = unpacked.read(start)
            sizes = struct.unpack(f">{axes}I", data[4:]) if len(data) == start else ()
            count = math.prod(sizes)
            data += unpacked.read(min(count, MOST_PACKED) + 1)  # no further than the header says
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source} cannot be unpacked: {first_line(error)}") from None
    if data[:4] != bytes([0, 0, IDX_BYTES, axes]) or len(data) - start != count:
        raise UserError(f"{source} is not an idx file of bytes with {axes} axes, or is cut off")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def _label(labels: list[str], number: Any, path: Path) -> str:
    if not isinstance(number, int) or not 0 <= number < len(labels):
        told = number if isinstance(number, int) else type(number).__name__
        raise UserError(f"{path}: a picture is of class {told}; there are {len(labels)}")
    return labels[number]
