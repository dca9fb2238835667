"""A disk as a power cut leaves it: contents as of their last flush, names as of their folder's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from mllm_keeplora.system import files


class Disk:
    """Records every flush (`files.flush`), and can lay out what would be there after any of them.

    A file that was never flushed has no bytes; a name, new, replaced or removed, counts once its folder is flushed.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.flushes: list[tuple[int, dict[str, int] | bytes]] = []  # inode, and its names or its content
        self.held: dict[int, IO] = {}  # so that no inode is given to another file
        flush = files.flush

        def recorded(path: Path) -> None:
            flush(path)
            self._record(Path(path))

        patch.setattr(files, "flush", recorded)

    def _record(self, path: Path) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            names = {}
            for entry in os.scandir(path):
                names[entry.name] = entry.inode()
                if entry.is_file():
                    self._hold(Path(entry.path))
            self.flushes.append((inode, names))
        else:
            self._hold(path)
            self.flushes.append((inode, path.read_bytes()))

    def _hold(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self.held:
            self.held[inode] = open(path, "rb")  # noqa: SIM115

    def lay_out(self, count: int, root: Path, target: Path) -> None:
        """Make below `target` what is below `root` if the power fails after so many flushes."""
        known = dict(self.flushes[:count])  # the last of each inode
        self._fill(known, root.stat().st_ino, target)

    def _fill(self, known: dict[int, dict[str, int] | bytes], folder: int, target: Path) -> None:
        target.mkdir(parents=True)
        for name, inode in known.get(folder, {}).items():
            content = known.get(inode, b"" if inode in self.held else {})
            if isinstance(content, dict):
                self._fill(known, inode, target / name)
            else:
                (target / name).write_bytes(content)
