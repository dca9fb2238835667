"""Modules of a user's own, for the time of a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mllm_keeplora.config import benchmarks
from mllm_keeplora.data.readers import READERS
from mllm_keeplora.metrics import SCORERS
from mllm_keeplora.strategies import STRATEGIES
from mllm_keeplora.system.plugins import ENTERED


@contextmanager
def plugin(name: str, **entries: Any) -> Iterator[None]:
    """Let a module of that content be importable; afterwards it is gone, and so is what it has entered."""
    module = ModuleType(name)
    module.__file__, module.__package__ = __file__, ""
    vars(module).update(entries)
    sys.modules[name] = module
    try:
        with registries_restored():
            yield
    finally:
        del sys.modules[name]


@contextmanager
def registries_restored() -> Iterator[None]:
    """Forget afterwards what plugins have entered."""
    registries = (STRATEGIES, SCORERS, READERS, benchmarks(), ENTERED)
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, content in zip(registries, before, strict=True):
            registry.clear()
            registry.update(content)
