"""A training on disk: its checkpoints, and what a strategy adds up in it, there and beside the finished branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_keeplora.strategies import Strategy
from mllm_keeplora.system import files

WEIGHTS, STATE = "trained.safetensors", "strategy.safetensors"  # of a checkpoint
COMPLETE = "complete.json"  # of a checkpoint; written last


def read_training_state(strategy: Strategy, path: Path | None) -> None:
    """Bring a strategy to where its training was; to its start where there is no such file."""
    strategy.load_training_state(files.read_tensors(path) if path is not None and path.is_file() else {})


def write_training_state(strategy: Strategy, path: Path) -> None:
    """Write what the strategy adds up in a training, if it does."""
    state = strategy.training_state()
    if state:
        files.write_tensors(path, state)


def last_checkpoint(folder: Path, identity: dict[str, Any]) -> str | None:
    """Find the newest whole checkpoint that belongs to the same training; None to start afresh."""
    marks = [mark for mark in folder.glob(f"checkpoint-*/{COMPLETE}") if files.read_json(mark) == identity]
    return max((str(mark.parent) for mark in marks), key=lambda name: int(name.rpartition("-")[2]), default=None)
