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
    if Path(location).is_dir():
        identity = fingerprint(Path(location))
    else:
        from transformers.utils.hub import cached_file, extract_commit_hash

        try:
            commit = extract_commit_hash(cached_file(location, "config.json", **pinned), None)  # the newest, or pinned
        except OSError as error:
            raise UserError(f"base.model {location!r} cannot be loaded: {first_line(error)}") from error
        if commit is None:
            raise UserError(f"base.model {location!r}: the hub gave no revision, so results could not name their base")
        identity = f"{location}@{commit}"
    if known_as not in (None, identity):
        raise UserError(f"base.model {model!r} has other weights than those that the run was started with")
    return identity, pinned
