"""Files that are whole or absent: every artefact is written under a temporary name, flushed to disk, then renamed.

A name outlives a power cut once its folder is flushed, and the folder's own name once the folder above is.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mllm_keeplora.errors import Unwritable, UserError, several, shortened, validation_faults
from mllm_keeplora.system import given
from mllm_keeplora.system.proofs import proofs_of, prove, proven

OBJECT = dict[str, Any]
EDGE = 1 << 20  # bytes of either end of a file that `digest_ends` reads
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM}  # to write, or to read: what was done tells
IN_TEXT = re.compile(r"(?:\(os error |\[Errno )(\d+)")  # of safetensors, and of copies of many files
OF_TORCH = re.compile(
    r"basic_ios::clear: iostream error|inline_container\.cc:\d+\] \. (?:unexpected pos|open .* strerror: (?P<why>.*))"
)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say in one sentence that a file, or what lies below a folder, cannot be written by the block.

    Raises:
        Unwritable: for want of room, or of the right to.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own
        refused = unwritable(error, path)
        if refused is None:
            raise
        raise refused from error


def unwritable(error: Exception, path: Path | None = None) -> Unwritable | None:
    """Make the sentence of an error that says that something cannot be written; None for any other error.

    Args:
        error: of Python, safetensors or torch.
        path: what was to be written. Without it a missing right is not taken for one to write.
    """
    said, file = str(error), getattr(error, "filename", None)
    number = getattr(error, "errno", None) or next(map(int, IN_TEXT.findall(said)), None)
    is_ours = path is not None and (file is None or _are_nested(path, Path(os.fsdecode(file))))
    if of_torch := OF_TORCH.search(said):
        reason = of_torch["why"] or "there seems to be no room left"
    elif number in NO_ROOM or number == errno.EROFS or (number in NO_RIGHT and is_ours):
        reason = os.strerror(number)
    else:
        return None
    what = path if file is None or (path is not None and not is_ours) else os.fsdecode(file)
    return Unwritable(f"{what or 'output'} cannot be written: {reason}; the same command continues once it can be")


def _are_nested(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it into place.

    Raises:
        Unwritable: for want of room, or of the right to; what was there before is still there.
    """
    proofs, name = proofs_of(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with written(path.parent):
        make_folder(path.parent)
        try:
            write(temporary)
            flush(temporary)
            if proofs is not None:
                proofs.replacing(name)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error counts
                temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)
    if proofs is not None:
        proofs.written(name)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all.

    Raises:
        Unwritable: for want of room, or of the right to.
    """
    rest = memoryview(f"{line}\n".encode())
    with written(path), open(path, "ab", buffering=0) as handle:
        end = handle.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[handle.write(rest) :]
        except BaseException:
            handle.truncate(end)
            raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlive a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's names, to disk; every such flush passes through here."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """Flush whatever is below a folder, and the folder itself."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process has given it its name meanwhile, and flushes it
            flush(path)
    flush(folder)


def put_in_place(part: Path, folder: Path) -> None:
    """Give a finished folder its name, which it has whole or not at all."""
    flush_all(part)
    os.rename(part, folder)
    flush(folder.parent)


def is_there(path: Path) -> bool:
    """Whether there is such a file; a UserError where one is known to have been (`proofs`)."""
    if not path.is_file():
        prove(path)
        return False
    return True


def cache_folder() -> Path:
    """Name the folder of what can be made again: `$MLLM_KEEPLORA_CACHE`, else one in the user's cache."""
    return Path(os.environ.get("MLLM_KEEPLORA_CACHE") or Path.home() / ".cache" / "mllm_keeplora")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with NaN refused: a number that was not measured is null."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def one_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(map(one_line, rows)))


def read_json(path: Path, kind: Any = Any) -> Any:
    """Read JSON; here, as in all that read, a UserError names a file that is missing or not readable.

    Args:
        path: of the file.
        kind: of what it holds, as pydantic understands types (`OBJECT`: keys and values); that is checked.
    """
    with proven(path):
        data = given.read_bytes(path)
        try:
            value = given.from_json(data)
        except ValueError as error:
            raise UserError(f"{path} is damaged: it is not readable JSON: {given.why(error)}") from None
        return checked(path, kind, value)


def read_json_lines(path: Path, kind: Any = OBJECT) -> list[Any]:
    """Read one JSON object a line, each of a kind as in `read_json`."""
    rows = []
    with proven(path):
        for number, line in enumerate(read_lines(path), start=1):
            try:
                rows.append(given.from_json(line))
            except ValueError as error:
                raise UserError(f"{path} is damaged: line {number} is not readable JSON: {given.why(error)}") from None
        return checked(path, list[kind], rows)


def read_lines(path: Path) -> list[str]:
    """Cut at line feeds alone: `str.splitlines` would also cut at separators inside a model's answer."""
    with io.TextIOWrapper(given.opened(path), encoding="utf-8", newline="\n") as handle:
        try:
            return [line.removesuffix("\n") for line in given.lines(handle) if line != "\n"]
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None


def checked(path: Path, kind: Any, value: Any) -> Any:
    """Give what a file holds as a kind has it; a UserError tells every fault with its key."""
    from pydantic import TypeAdapter, ValidationError

    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} is damaged: half a character stands in a text; nothing could write it") from None
    except ValueError:
        raise UserError(f"{path} is damaged: a number in it is not finite") from None
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise several(validation_faults(error, str(path), None)) from None


def write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; tensors are moved to the CPU and made contiguous."""
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if not hasattr(tensor, "detach"):
            raise TypeError(f"{path}: {name} must be a tensor, got {type(tensor).__name__}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))


def read_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with proven(path), _named(path, SafetensorError):
        given.opened(path).close()
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Read what `write_tensors` was given beside the tensors."""
    from safetensors import SafetensorError, safe_open

    given.opened(path).close()
    with proven(path), _named(path, SafetensorError), safe_open(path, "pt") as stored:
        return stored.metadata() or {}


def read_facts(path: Path, key: str, kind: Any = OBJECT) -> Any:
    """Read JSON that `write_tensors` was given under a key beside the tensors, of a kind as in `read_json`."""
    try:
        value = given.from_json(read_metadata(path).get(key, ""))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: what it says as {key!r} is not readable JSON: {given.why(error)}"
        ) from None
    return checked(path, kind, value)


@contextmanager
def _named(path: Path, faults: type[Exception] | tuple[type[Exception], ...], what: str = "") -> Iterator[None]:
    """Let a file that is missing, or not readable for one of these faults, be named to the user."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except faults as error:
        raise UserError(f"{path} is damaged: {what or shortened(error)}") from None


def digest_ends(total: Any, path: Path, name: str) -> None:
    """Add a file to a running hash by its name, its size and its first and last mebibyte."""
    size = path.stat().st_size
    total.update(f"{name}:{size}".encode())
    with given.opened(path) as handle:
        total.update(handle.read(EDGE))
        handle.seek(max(0, size - EDGE))
        total.update(handle.read(EDGE))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left behind."""
    for path in folder.rglob("*.tmp"):
        path.unlink()
