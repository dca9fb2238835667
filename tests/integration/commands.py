"""The command line, called as a person would: within this process, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Said:
    code: int
    out: str
    err: str


def shell(*words: object) -> Said:
    """`python -m mllm_keeplora` in a process of its own, which imports everything anew: seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "mllm_keeplora", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    return Said(done.returncode, done.stdout, done.stderr)


def caller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Said]:
    """The same within this process: arguments, exit code and both outputs."""
    from mllm_keeplora.__main__ import _run

    def command(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["mllm-keeplora", *map(str, words)])
        capsys.readouterr()
        code = _run()
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return command


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; nothing where it is absent."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
