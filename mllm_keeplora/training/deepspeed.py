"""DeepSpeed settings by name: the shipped JSON files, or a path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mllm_keeplora.errors import UserError, known


def deepspeed_file(name: str | None) -> str | None:
    """Path of a DeepSpeed JSON by its shipped name (`zero2`) or path; None without DeepSpeed.

    Raises:
        UserError: neither shipped nor a file, or DeepSpeed is not installed.
    """
    if name is None:
        return None
    folder = resources.files("mllm_keeplora.configs") / "deepspeed"
    names = [entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")]
    path = Path(str(folder / f"{name}.json")) if name in names else Path(name)
    if not path.is_file():
        raise UserError(f"deepspeed {name!r} is neither a shipped name ({known(names)}) nor a file")
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise UserError("deepspeed is asked for but not installed: pip install 'mllm-keeplora[deepspeed]'")
    return str(path)
