"""Digests of a folder's files, entered as they are written and compared as they are read.

A run directory keeps them in its ledger (`runs.RunDir`); `system/files.py` asks here at every write and read, so that
no reader can forget to. A file whose digest is not known, as in runs of older versions, is read as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mllm_keeplora.errors import UserError

BLOCK = 1 << 20  # bytes


@dataclass
class Proofs:
    """Proofs know what the files of a folder should be.

    Attributes:
        folder: absolute.
        digests: relative path -> sha256; the owner's own dictionary, which it stores.
        is_kept: tells by the relative path whether a file that is written is to be entered.
        store: stores the digests, called before a file that is known is replaced: killed in between, it is unknown.
        remedy: says by the relative path how a file that is lost or damaged can be made again.
    """

    folder: Path
    digests: dict[str, str]
    is_kept: Callable[[str], bool]
    store: Callable[[], None]
    remedy: Callable[[str], str]
    seen: dict[str, tuple[int, ...]] = field(default_factory=dict)  # files that were compared, or written, as they are

    def replacing(self, name: str) -> None:
        """Forget a file that is about to be replaced."""
        if self.digests.pop(name, None) is not None:
            self.store()

    def written(self, name: str) -> None:
        if self.is_kept(name):
            path = self.folder / name
            self.digests[name], self.seen[name] = digest(path), state_of(path)

    def fault(self, name: str) -> str | None:
        """Say what is wrong with a file; None if it is what it was, or is not known."""
        path, known = self.folder / name, self.digests.get(name)
        if known is None:
            return None
        if not path.is_file():
            return f"{path} is missing"
        state = state_of(path)
        if self.seen.get(name) != state:
            if digest(path) != known:
                return f"{path} is not what the run has written: it is damaged or was changed"
            self.seen[name] = state
        return None


PROOFS: dict[Path, Proofs] = {}  # by folder; the last one that was opened counts


def prove(path: Path) -> None:
    """Compare a file with its digest, if one is known.

    Raises:
        UserError: it is lost or changed; the sentence says how it can be made again.
    """
    proofs, name = proofs_of(path)
    fault = proofs.fault(name) if proofs is not None else None
    if fault is not None:
        raise UserError(f"{fault}; {proofs.remedy(name)}")


@contextmanager
def proven(path: Path) -> Iterator[None]:
    """Compare a file once the block has read it; of one that cannot be read say how it can be made again.

    Raises:
        UserError: it is lost or changed, or of the block.
    """
    try:
        yield
    except UserError as error:
        proofs, name = proofs_of(path)
        if proofs is None or proofs.fault(name) is None:
            raise
        raise UserError(f"{error}; {proofs.remedy(name)}") from None
    prove(path)


def accept(path: Path) -> str | None:
    """Take a file as it is from now on; give what was wrong with it, None if nothing was."""
    proofs, name = proofs_of(path)
    fault = proofs.fault(name) if proofs is not None else None
    if fault is not None:
        proofs.replacing(name)
        proofs.written(name)
    return fault


def proofs_of(path: Path) -> tuple[Proofs | None, str]:
    """Find who knows a file, and the name by which it is known there."""
    absolute = Path(os.path.abspath(path))
    folder = next((parent for parent in absolute.parents if parent in PROOFS), None)
    return (PROOFS[folder], absolute.relative_to(folder).as_posix()) if folder is not None else (None, "")


def digest(path: Path) -> str:
    """Digest all bytes of a file, sha256 in hexadecimal digits."""
    total = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def state_of(path: Path) -> tuple[int, ...]:
    """Give what changes with a file's content, as long as nobody sets clocks back: size, time, place on the disk."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
