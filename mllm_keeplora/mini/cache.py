"""Folders of data that are made once, in the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int], None]


def cached(name: str, write: Callable[[Path], None], cache_dir: Path | None = None) -> Path:
    """Find a folder of the cache; it is written first if it is not there yet.

    Safe against several processes: each writes under a name of its own, the first to finish wins.

    Args:
        name: of the folder; it must change when what is written does.
        write: fills an empty folder.
        cache_dir: default `$MLLM_KEEPLORA_CACHE`, else `~/.cache/mllm_keeplora`.
    """
    default = os.environ.get("MLLM_KEEPLORA_CACHE") or Path.home() / ".cache" / "mllm_keeplora"
    cache = Path(cache_dir or default)
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="drawing-", dir=cache))
    try:
        write(temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
