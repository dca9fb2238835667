"""What is kept between processes: it is found again, bounded, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_keeplora.system import known as module
from mllm_keeplora.system.known import Known, digest_file, key_of


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "known.sqlite"


def kept(path: Path, count: int = 200) -> int:
    with Known(path) as known:
        return sum(known.get(key_of(number)) == str(number) for number in range(count))


def keep(path: Path, count: int = 200, start: int = 0) -> None:
    with Known(path) as known:
        for number in range(start, count):
            known.put(key_of(number), str(number))


def test_what_was_kept_is_found_by_the_next_process(path):
    with Known(path) as known:
        known.put(key_of("a", 1), "text")
        assert known.get(key_of("a", 1)) == "text" and known.get(key_of("a", 2)) is None
    with Known(path) as known:
        assert known.get(key_of("a", 1)) == "text"


def test_a_killed_process_loses_the_last_entries_alone(path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom mllm_keeplora.system.known import Known, key_of\n"
        "known = Known(Path(sys.argv[1]))\nfor number in range(200): known.put(key_of(number), str(number))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=300).returncode == -9
    assert kept(path) >= 200 - module.WAITING


def test_several_processes_keep_at_the_same_time(path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mllm_keeplora.system.known import Known, key_of\n"
        "with Known(Path(sys.argv[1])) as known:\n"
        "    for number in range(int(sys.argv[2]), 1000, 3): known.put(key_of(number), str(number))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(start)]) for start in range(3)]
    assert [writer.wait(300) for writer in writers] == [0, 0, 0]
    assert kept(path, 1000) == 1000


@pytest.mark.parametrize("damage", ["garbage", "middle"])
def test_a_damaged_file_is_begun_anew(path, damage):
    keep(path, 2000)
    whole = path.read_bytes()
    path.write_bytes(b"garbage" * 1000 if damage == "garbage" else whole[:4096] + bytes(len(whole) - 4096))
    assert kept(path) == 0
    keep(path)
    assert kept(path) == 200


def test_where_nothing_can_be_kept_everything_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level("INFO", logger="mllm_keeplora"):
        keep(tmp_path / "file" / "known.sqlite")
    assert caplog.text.count("is not kept in") == 1
    assert kept(tmp_path / "file" / "known.sqlite") == 0


def test_beyond_its_limit_the_older_half_is_forgotten(path, monkeypatch):
    keep(path, 2000)
    monkeypatch.setattr(module, "LIMIT", path.stat().st_size - 1)
    keep(path, 2400, start=2000)
    with Known(path) as known:
        found = [number for number in range(2400) if known.get(key_of(number)) is not None]
    assert 1000 <= len(found) <= 1500 and found[-1] == 2399 and found[0] >= 900


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that has not changed for long."""
    monkeypatch.setattr(module, "SETTLED_S", -1.0)
    (tmp_path / "picture.png").write_bytes(b"one")
    return tmp_path / "picture.png"


def test_a_file_is_read_once_until_it_changes(path, settled, monkeypatch):
    with Known(path) as known:
        first = digest_file(settled, known)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("it was read again"))
    with Known(path) as known:
        assert digest_file(settled, known) == first


@pytest.mark.parametrize("how", ["in place", "by another"])
def test_other_content_of_the_same_size_and_time_is_another_digest(path, settled, how):
    before = settled.stat()
    with Known(path) as known:
        first = digest_file(settled, known)
        if how == "by another":
            settled.unlink()
        settled.write_bytes(b"two")
        os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert digest_file(settled, known) != first


def test_a_file_that_has_just_changed_is_read_again(path, tmp_path, monkeypatch):
    (tmp_path / "new.png").write_bytes(b"one")
    with Known(path) as known:
        digest_file(tmp_path / "new.png", known)
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError("read again")))
    with Known(path) as known, pytest.raises(PermissionError):
        digest_file(tmp_path / "new.png", known)
