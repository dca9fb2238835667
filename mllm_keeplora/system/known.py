"""What was found out once and is not found out again: short texts by the content that they are about.

A SQLite file in the user's cache, with a rollback journal and short transactions, so that processes of one machine or
of several may share it. It is a help and no more: where it cannot be used everything is found out anew, and a damaged
one is begun anew.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mllm_keeplora.system import files
from mllm_keeplora.system.log import log
from mllm_keeplora.system.proofs import digest

T = TypeVar("T")
LIMIT = 1 << 30  # bytes; beyond that the older half is forgotten
WAITING, WAITING_S = 64, 0.5  # entries, and seconds, after which they are written: so much a killed process loses
BUSY_S = 20  # how long another process may be writing
SETTLED_S = 2.0  # a file that was changed this recently may be changed once more within a tick of its clock
TABLE = "known_1"  # another form of the table gets another number


class Known:
    """Keeps texts by key, from any thread, until it is closed; one without a file keeps nothing.

    Args:
        path: the file; made where there is none.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._base: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._waiting: dict[bytes, str] = {}
        self._written_at = time.monotonic()

    @classmethod
    def of_user(cls) -> Known:
        """Take the file in the user's cache folder."""
        return cls(files.cache_folder() / "known.sqlite")

    def __enter__(self) -> Known:
        return self

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._write()
            self._disconnect()

    def get(self, key: bytes) -> str | None:
        """Give what was kept under a key of `key_of`; None where nothing was."""
        with self._lock:
            if key in self._waiting:
                return self._waiting[key]
            row = self._do(lambda base: base.execute(f"SELECT text FROM {TABLE} WHERE key = ?", (key,)).fetchone())
            return row[0] if row is not None else None

    def put(self, key: bytes, text: str = "") -> None:
        """Keep a text; it is on disk soon, and at the latest when this is closed."""
        with self._lock:
            if self._path is None:
                return
            self._waiting[key] = text
            if len(self._waiting) >= WAITING or time.monotonic() - self._written_at > WAITING_S:
                self._write()

    def _write(self) -> None:
        def write(base: sqlite3.Connection) -> None:
            with base:
                base.executemany(f"INSERT OR REPLACE INTO {TABLE} (key, text) VALUES (?, ?)", self._waiting.items())

        if self._waiting:
            self._do(write)
        self._waiting.clear()
        self._written_at = time.monotonic()

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Give what some work on the file gives; None where the file cannot be used."""
        is_new = False
        while self._path is not None:
            try:
                self._base = self._base or _connected(self._path)
                return work(self._base)
            except (sqlite3.DatabaseError, OSError) as error:
                self._disconnect()
                is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(
                    error, sqlite3.OperationalError
                )
                if is_damaged and not is_new and _removed(self._path):
                    is_new = True
                    log.info("%s is begun anew: %s", self._path, error)
                else:  # no place, no right to write, another process writes for long
                    log.info("what is found out is not kept in %s: %s", self._path, error)
                    self._path = None
        return None

    def _disconnect(self) -> None:
        if self._base is not None:
            self._base.close()
        self._base = None


def key_of(*facts: Any) -> bytes:
    """Digest facts that have the same `repr` in every process into a key (16 bytes)."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def digest_file(path: Path, known: Known) -> str:
    """Digest a file's content (SHA-256), which is read if nothing was kept for its path, inode, size and times.

    Raises:
        OSError: it cannot be read.
    """

    def key(status: os.stat_result) -> bytes:
        times = status.st_mtime_ns, status.st_ctime_ns  # who sets the one back moves the other
        return key_of("file", os.path.abspath(path), status.st_ino, status.st_size, *times)

    status = os.stat(path)  # before it is read: what changes meanwhile has another key
    found = known.get(key(status))
    if found is None:
        found = digest(path)
        if time.time() - status.st_ctime > SETTLED_S:
            known.put(key(status), found)
    return found


def _connected(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    base = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    base.execute("PRAGMA synchronous = OFF")  # what a machine that loses power makes of it is seen as damage
    base.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} (key BLOB NOT NULL UNIQUE, text TEXT NOT NULL)")
    [pages], [free], [size] = (
        base.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
    )
    if (pages - free) * size > LIMIT:
        with base:
            base.execute(f"DELETE FROM {TABLE} WHERE rowid <= (SELECT (min(rowid) + max(rowid)) / 2 FROM {TABLE})")
    return base


def _removed(path: Path) -> bool:
    try:
        for each in (path, path.with_name(f"{path.name}-journal")):
            each.unlink(missing_ok=True)
    except OSError:
        return False
    return True
