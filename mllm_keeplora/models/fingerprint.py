"""Which weights a base has: a digest of a folder's, the commit of a hub's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mllm_keeplora.errors import UserError, first_line
from mllm_keeplora.system import files


def fingerprint(folder: Path) -> str:
    """Digest the config and, of each weight file, its size and its first and last mebibyte (not the whole)."""
    total = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if not path.is_file():
            raise UserError(f"base folder {folder} has no {path.name}")
        files.digest_ends(total, path, path.name)
    return total.hexdigest()[:16]


def identity_of(model: str, location: str, known_as: str | None) -> tuple[str, dict[str, str]]:
    """Find a base's fingerprint, and the arguments that load that revision of it from a hub."""
    known_name, _, revision = (known_as or "").partition("@")
    pinned = {"revision": revision} if revision and known_name == location else {}
    identity = fingerprint(Path(location)) if Path(location).is_dir() else _hub_revision(location, pinned)
    if known_as not in (None, identity):
        raise UserError(f"base.model {model!r} has other weights than those that the run was started with")
    return identity, pinned


def _hub_revision(location: str, pinned: dict[str, str]) -> str:
    """Name of a hub's base and its commit: the newest, or the pinned one."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        revision = extract_commit_hash(cached_file(location, "config.json", **pinned), None)
    except OSError as error:
        raise UserError(f"base.model {location!r} cannot be loaded: {first_line(error)}") from error
    if revision is None:
        raise UserError(f"base.model {location!r}: the hub gave no revision, so results could not name their base")
    return f"{location}@{revision}"
