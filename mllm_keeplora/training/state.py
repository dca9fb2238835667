"""A training on disk: its checkpoints, and what a strategy adds up in it, there and beside the finished branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log
from mllm_keeplora.system.proofs import digest

WEIGHTS, STATE = "trained.safetensors", "strategy.safetensors"  # of a checkpoint
DIGESTS = "digests.json"  # of a checkpoint's files, sha256 by name
COMPLETE = "complete.json"  # of a checkpoint: which training it belongs to; written last


def read_training_state(strategy: Strategy, path: Path | None) -> None:
    """Bring a strategy to where its training was; to its start where there is no such file."""
    strategy.load_training_state(files.read_tensors(path) if path is not None and files.is_there(path) else {})


def write_training_state(strategy: Strategy, path: Path) -> None:
    """Write what the strategy adds up in a training, if it does."""
    state = strategy.training_state()
    if state:
        files.write_tensors(path, state)


def complete_checkpoint(folder: Path, identity: dict[str, Any]) -> None:
    """Mark a checkpoint as whole, with the digests of its files; they are flushed already."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files.write_json(folder / DIGESTS, {path.relative_to(folder).as_posix(): digest(path) for path in paths})
    files.flush(folder.parent)
    files.write_json(folder / COMPLETE, identity)


def last_checkpoint(folder: Path, identity: dict[str, Any]) -> str | None:
    """Find the newest whole checkpoint that belongs to the same training; None to start afresh.

    One that does not prove whole is passed over for the one before, and a warning says so.
    """
    for mark in sorted(folder.glob(f"checkpoint-*/{COMPLETE}"), key=_number, reverse=True):
        try:
            if files.read_json(mark) != identity:
                continue
            damaged = _damaged(mark.parent)
        except UserError as error:
            damaged = str(error)
        if damaged is None:
            return str(mark.parent)
        log.warning("checkpoint %s is passed over: %s", mark.parent, damaged)
    return None


def _number(mark: Path) -> int:
    return int(mark.parent.name.rpartition("-")[2])


def _damaged(folder: Path) -> str | None:
    """Say which file of a checkpoint is not what it was; of older versions, without digests, which has no bytes."""
    if not (folder / DIGESTS).is_file():
        empty = (path.name for path in folder.rglob("*") if path.is_file() and not path.stat().st_size)
        return next((f"{name} is empty" for name in empty), None)
    for name, known in files.read_json(folder / DIGESTS).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != known:
            return f"{name} is damaged"
    return None
