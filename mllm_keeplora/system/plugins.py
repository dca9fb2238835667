"""A user's own modules, which a config names under `plugins`: their strategies, scorers, benchmarks and readers.

A plugin states what it has in dictionaries of its own, named as the registries are; nothing is searched for.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from importlib import import_module, metadata
from pathlib import Path

from mllm_keeplora.errors import UserError, first_line

REGISTRIES = {  # by name, because they lie in rooms above
    "STRATEGIES": "mllm_keeplora.strategies:STRATEGIES",
    "SCORERS": "mllm_keeplora.metrics:SCORERS",
    "BENCHMARKS": "mllm_keeplora.config:benchmarks",
    "READERS": "mllm_keeplora.data.readers:READERS",
}
ENTERED: dict[tuple[str, str], str] = {}  # registry and name -> the plugin that has entered it


def load_plugins(names: Iterable[str], origin: str) -> None:
    """Import modules and enter what they state in the registries; again is not an error.

    Args:
        names: of modules that Python can import.
        origin: where they are named, for faults.

    Raises:
        UserError: a module that cannot be imported or states nothing, or a name that something else has already.
    """
    for plugin in names:
        try:
            module = import_module(plugin)
        except ImportError as error:
            raise UserError(
                f"plugins: {plugin} cannot be imported ({first_line(error)}); install it, or put the folder that it "
                f"lies in on PYTHONPATH ({origin})"
            ) from None
        if not any(hasattr(module, kind) for kind in REGISTRIES):
            raise UserError(f"plugins: {plugin} has none of {', '.join(REGISTRIES)}; name a module that has ({origin})")
        for kind, home in REGISTRIES.items():
            entries = getattr(module, kind, {})
            if not isinstance(entries, dict):
                raise UserError(f"plugins: {plugin}.{kind} must be a dictionary, got {type(entries).__name__}")
            if entries:
                _enter(kind, home, entries, plugin, origin)


def _enter(kind: str, home: str, entries: dict, plugin: str, origin: str) -> None:
    owner, _, name = home.partition(":")
    registry = getattr(import_module(owner), name)
    registry = registry() if callable(registry) else registry
    for name, entry in entries.items():
        if name in registry and ENTERED.get((kind, name)) != plugin:
            by = ENTERED.get((kind, name), "this package")
            raise UserError(f"plugins: {plugin}.{kind} has {name!r}, which {by} has, too; rename it ({origin})")
        registry[name], ENTERED[kind, name] = entry, plugin


def version_of(plugin: str) -> str:
    """Give the version of a loaded plugin's distribution, if it has one, and a digest of its source files.

    A module within a package counts with all the package's files beside it and below: it may import them.
    """
    module = sys.modules[plugin]
    file = Path(module.__file__)
    sources = sorted(file.parent.rglob("*.py")) if module.__package__ else [file]
    digest = hashlib.sha256(b"".join(hashlib.sha256(source.read_bytes()).digest() for source in sources))
    found = metadata.packages_distributions().get(plugin.partition(".")[0], [])
    return " ".join([*(metadata.version(name) for name in found[:1]), f"sha256:{digest.hexdigest()[:16]}"])
