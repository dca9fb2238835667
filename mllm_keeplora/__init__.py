"""Teach a LLaVA-style multimodal LLM one domain after another without forgetting.

The Python interface: `load_config`, `run_sequence`, `load_run`, `evaluate`. Heavy libraries are imported where used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_keeplora.config import load_config
    from mllm_keeplora.eval.saved import evaluate, load_run
    from mllm_keeplora.sequence import run_sequence

__version__ = "0.1.0"
__all__ = ["evaluate", "load_config", "load_run", "run_sequence"]

_HOMES = {
    "load_config": "mllm_keeplora.config",
    "run_sequence": "mllm_keeplora.sequence",
    "load_run": "mllm_keeplora.eval.saved",
    "evaluate": "mllm_keeplora.eval.saved",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
