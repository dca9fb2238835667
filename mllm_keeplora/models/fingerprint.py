"""Which base it is: a digest of all that is read of a folder, the commit of a hub's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from mllm_keeplora.errors import UserError, first_line
from mllm_keeplora.system import files
from mllm_keeplora.system.known import Known, digest_file

READ = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}  # endings of what a base is read from
OF_ENDS = re.compile(r"[0-9a-f]{16}")  # the form that older runs have recorded


def fingerprint(folder: Path, like: str | None = None) -> str:
    """Digest every byte of the files that a base is read from: weights, configs, tokenizer, processor, templates.

    Each is read once, and known again by its size, times and inode (`system/known.py`).

    Args:
        folder: of the base.
        like: a recorded fingerprint, which this one is to be compared with. Older runs recorded one of config and
            weights alone, of whose files only the ends were read.

    Raises:
        UserError: the folder has no config.json, or a file in it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"base folder {folder} has no config.json")
    total = hashlib.sha256()
    if like is not None and OF_ENDS.fullmatch(like):
        for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
            files.digest_ends(total, path, path.name)
        return total.hexdigest()[:16]
    with Known.of_user() as known:
        for path in sorted(_read_files(folder)):
            total.update(f"{path.relative_to(folder).as_posix()}:{digest_file(path, known)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _read_files(folder: Path) -> Iterator[Path]:
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.suffix in READ and not path.name.startswith(".") and path.is_file():
            yield path


def identity_of(model: str, location: str, known_as: str | None) -> tuple[str, dict[str, str]]:
    """Find a base's fingerprint, and the arguments that load that revision of it from a hub."""
    known_name, _, revision = (known_as or "").partition("@")
    pinned = {"revision": revision} if revision and known_name == location else {}
    if Path(location).is_dir():
        identity = fingerprint(Path(location), like=known_as)
    else:
        from transformers.utils.hub import cached_file, extract_commit_hash, is_offline_mode

        try:
            commit = extract_commit_hash(cached_file(location, "config.json", **pinned), None)  # the newest, or pinned
        except OSError as error:
            if is_offline_mode():
                raise UserError(
                    f"base.model {location!r} is not in the hub's cache on this machine, and HF_HUB_OFFLINE keeps it "
                    "from being fetched"
                ) from error
            raise UserError(f"base.model {location!r} cannot be loaded: {first_line(error)}") from error
        if commit is None:
            raise UserError(f"base.model {location!r}: the hub gave no revision, so results could not name their base")
        identity = f"{location}@{commit}"
    if known_as not in (None, identity):
        raise UserError(f"base.model {model!r} has other weights than those that the run was started with")
    return identity, pinned
