"""What a strategy adds up during a training, on disk: in each checkpoint, and beside the finished branch."""

from __future__ import annotations

from pathlib import Path

from mllm_keeplora import files
from mllm_keeplora.strategies import Strategy


def read_training_state(strategy: Strategy, path: Path | None) -> None:
    """Bring a strategy to where its training was; to its start where there is no such file."""
    strategy.load_training_state(files.read_tensors(path) if path is not None and path.is_file() else {})


def write_training_state(strategy: Strategy, path: Path) -> None:
    """Leave what the strategy has, if it has something."""
    state = strategy.training_state()
    if state:
        files.write_tensors(path, state)
