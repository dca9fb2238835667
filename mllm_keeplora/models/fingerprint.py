"""Which base it is: a digest of all that is read of a folder, the commit of a hub's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError, first_line
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log

READ = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}  # endings of what a base is read from
LARGE = 1 << 26  # bytes from which on a file's digest is kept
OF_ENDS = re.compile(r"[0-9a-f]{16}")  # the form that older runs have recorded


def fingerprint(folder: Path, like: str | None = None) -> str:
    """Digest every byte of the files that a base is read from: weights, configs, tokenizer, processor, templates.

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
    for name, digest in sorted(_digests(folder).items()):
        total.update(f"{name}:{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _digests(folder: Path) -> dict[str, str]:
    """Digest each file by name; those of large files are kept until size, times or inode of the file change."""
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    store = files.cache_folder() / "digests" / f"{place}.json"
    kept, large, found = _kept(store), {}, {}
    for path in _read_files(folder):
        name, state = path.relative_to(folder).as_posix(), _state(path)
        known = kept.get(name)
        if isinstance(known, list) and known[:-1] == state:
            found[name] = known[-1]
        else:
            if state[0] >= LARGE:
                log.info("reading %s (%.1f GB) once to know it again", path, state[0] / 1e9)
            with open(path, "rb") as handle:
                found[name] = hashlib.file_digest(handle, "sha256").hexdigest()
        if state[0] >= LARGE and state == _state(path):
            large[name] = [*state, found[name]]
    if large != kept:
        with suppress(OSError):  # of a cache that cannot be written nothing is kept
            files.write_json(store, large)
    return found


def _read_files(folder: Path) -> Iterator[Path]:
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.suffix in READ and not path.name.startswith(".") and path.is_file():
            yield path


def _state(path: Path) -> list[int]:
    """Tell size, times and inode of a file; a link stands for what it points to."""
    told = path.stat()
    return [told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino]


def _kept(store: Path) -> dict[str, Any]:
    """Read what was kept; nothing where that is missing or damaged."""
    try:
        kept = files.read_json(store)
    except (UserError, OSError):
        return {}
    return kept if isinstance(kept, dict) else {}


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
