"""Data sets that keep the pixels of many pictures in one file: CIFAR100's pickles and MNIST's idx files."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from pickle import Unpickler
from typing import TYPE_CHECKING, Any

from mllm_keeplora.data.layouts.published import Published, named
from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import given

if TYPE_CHECKING:
    import numpy as np

MOST_PACKED = 1 << 29  # bytes of a packed file, and of what a compressed one holds
DIGITS = [str(digit) for digit in range(10)]
IDX_BYTES = 0x08  # the kind of number in an idx file: unsigned bytes


class _Plain(Unpickler):
    """Builds arrays, lists, dictionaries, numbers and strings; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module not in {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"} or name not in allowed:
            raise UserError(f"it asks for {module}.{name}, which is neither an array nor a plain value")
        return allowed[name]


def cifar100(path: Path, split: str) -> Published:
    """Read CIFAR100, the version for Python, with the fine labels."""
    labels = _plain(path / "meta", "fine_label_names")

    def rows() -> Iterator[tuple[np.ndarray, str]]:
        import numpy as np

        file = path / named({"train": "train", "test": "test"}, split)
        values = _plain(file)
        pixels, fine = values.get("data"), values.get("fine_labels")
        is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        if not is_array or not isinstance(fine, list) or pixels.shape != (len(fine), 3 * 32 * 32):
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
            values = _Plain(handle, encoding="latin1").load()
        except Exception as error:  # of whatever kind a damaged pickle raises
            raise UserError(f"{path} is not a readable pickle of CIFAR100: {shortened(first_line(error))}") from None
    if not isinstance(values, dict) or (key is not None and not isinstance(values.get(key), list)):
        raise UserError(f"{path} must hold a dictionary" + (f" with a list {key}" if key else ""))
    return values if key is None else values[key]


def _idx(path: Path, axes: int) -> np.ndarray:
    """Read an idx file of bytes with so many axes: a header of sizes (big-endian), then the values."""
    import numpy as np

    packed = path.with_name(f"{path.name}.gz")
    source = path if path.is_file() or not packed.is_file() else packed
    with given.opened(source, MOST_PACKED) as handle:
        try:
            data = handle.read() if source == path else gzip.GzipFile(fileobj=handle).read(MOST_PACKED)
        except (OSError, EOFError) as error:
            raise UserError(f"{source} cannot be unpacked: {first_line(error)}") from None
    start = 4 * (axes + 1)
    sizes = struct.unpack(f">{axes}I", data[4:start]) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, IDX_BYTES, axes]) or len(data) - start != int(np.prod(sizes, dtype=np.int64)):
        raise UserError(f"{source} is not an idx file of bytes with {axes} axes, or is cut off")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def _label(labels: list[str], number: Any, path: Path) -> str:
    if not isinstance(number, int) or not 0 <= number < len(labels):
        raise UserError(f"{path}: a picture is of class {number!r}; there are {len(labels)}")
    return labels[number]
