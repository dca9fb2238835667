"""A base is known by every byte that is read of it; large files are read once, and older runs know it by less."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mllm_keeplora.errors import UserError
from mllm_keeplora.models.fingerprint import fingerprint, identity_of
from mllm_keeplora.system import known

HALF_WAY = Path(__file__).parents[2] / "fixtures" / "half_way"


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A copy of the base, whose files count as settled at once, with a cache of its own."""
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_S", -1.0)
    return shutil.copytree(tiny_folder, tmp_path / "base")


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are read whole."""
    names, whole = [], known.digest
    monkeypatch.setattr(known, "digest", lambda path: names.append(path.name) or whole(path))
    return names


def flip(path: Path, place: int) -> None:
    """Change one byte, and nothing that a folder's listing shows."""
    told = path.stat()
    with open(path, "rb+") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_any_byte_of_any_file_that_is_read_is_seen(name, folder):
    before = fingerprint(folder)
    assert fingerprint(folder) == before and before.startswith("sha256:") and len(before) == 71
    flip(folder / name, (folder / name).stat().st_size // 2)
    assert fingerprint(folder) != before


def test_a_file_that_comes_or_goes_is_seen_and_one_that_is_not_read_is_not(folder):
    before = fingerprint(folder)
    (folder / "README.md").write_text("a card")
    (folder / ".hidden.json").write_text("{}")
    assert fingerprint(folder) == before
    (folder / "added_tokens.json").write_text("{}")
    assert fingerprint(folder) != before
    (folder / "added_tokens.json").rename(folder / "special_tokens_map.json")
    assert fingerprint(folder) != before


def test_large_files_are_read_once(folder, read):
    before = fingerprint(folder)
    assert "model.safetensors" in read
    read.clear()
    assert fingerprint(folder) == before and read == []
    flip(folder / "model.safetensors", 100)  # in the header; the time of the change itself cannot be set back
    assert fingerprint(folder) != before and read == ["model.safetensors"]


def test_a_cache_that_cannot_be_written_is_done_without(folder, monkeypatch):
    before = fingerprint(folder)
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(folder.parent / "file"))
    assert fingerprint(folder) == before


def test_a_link_is_known_by_what_it_points_to(folder, tmp_path):
    before = fingerprint(folder)
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert fingerprint(folder) == before
    flip(tmp_path / "blob", 5000)
    assert fingerprint(folder) != before


def test_an_older_runs_base_is_compared_as_it_was_recorded():
    base = HALF_WAY / "base"
    assert fingerprint(base, like="fb26cd5aa1de59cc") == "fb26cd5aa1de59cc"
    assert identity_of("base", str(base), "fb26cd5aa1de59cc")[0] == "fb26cd5aa1de59cc"
    assert fingerprint(base, like=fingerprint(base)) == fingerprint(base) != "fb26cd5aa1de59cc"
    with pytest.raises(UserError, match="has other weights"):
        identity_of("base", str(base), "0b26cd5aa1de59cc")


def test_a_hub_base_that_is_not_on_this_machine_is_named_with_why_it_stays_away(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"base.model 'nobody/nothing' is not in the hub's cache .* HF_HUB_OFFLINE"):
        identity_of("nobody/nothing", "nobody/nothing", None)
