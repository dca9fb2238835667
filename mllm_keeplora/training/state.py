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
    """Leave what the strategy has, if it has something."""
    state = strategy.training_state()
    if state:
        files.write_tensors(path, state)


def last_checkpoint(folder: Path, identity: dict[str, Any]) -> str | None:
    """The newest checkpoint that was written to its end and belongs to the same training; None to start afresh."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file() and files.read_json(path / COMPLETE) == identity:
            found.append((int(path.name.split("-")[1]), str(path)))
    return max(found)[1] if found else None
