"""A disk that is full, or may not be written: one sentence, a code of its own, and the run goes on where it was."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.integration.commands import Said
from tests.integration.processes import command_in_child, differing, leftovers, run_on_two, stages

FIT = "mllm_keeplora.training.fit"
PLACES = {  # what is being written
    "opening": ("rename:run.json", 1),
    "log": ("logging:StreamHandler.flush", 3),
    "checkpoint": ("torch:save", 2),
    "metrics": ("mllm_keeplora.system.files:append_line", 9),
}
MORE_PLACES = {
    "lock": ("mllm_keeplora.runs:RunDir.locked", 1),
    "config": ("rename:config.yaml", 1),
    "prepare": ("rename:prepare/basis.safetensors", 1),
    "trainer": ("transformers.trainer_callback:TrainerState.save_to_json", 2),
    "adapter": ("rename:adapter_model.safetensors", 2),
    "predictions": ("rename:predictions/Beta.jsonl", 2),
    "flush": ("os:fsync", 20),
    "results": ("rename:results.json", 1),
    "page": ("rename:report.html", 1),
}


def full(number: int = errno.ENOSPC) -> None:
    raise OSError(number, os.strerror(number))


def full_for_torch() -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 250752 vs 250656")


def _told(said: Said, reason: str) -> None:
    assert said.code == 74, said
    assert "Traceback" not in said.err + said.out
    [sentence] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert f" cannot be written: {reason}" in sentence and "the same command continues" in sentence


def _fails_and_continues(place: tuple[str, int], act, reason: str, settings, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(output)))
    _told(command_in_child("run", tmp_path / "run.yaml", kill=place, act=act), reason)
    assert list(output.rglob("*.tmp")) == []
    said = command_in_child("run", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert differing(output, two) == [] and stages(output) == stages(two) and leftovers(output) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(place, settings, two, tmp_path):
    reason = "there seems to be no room left" if place == "checkpoint" else "No space left on device"
    act = full_for_torch if place == "checkpoint" else full
    _fails_and_continues(PLACES[place], act, reason, settings, two, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("place", MORE_PLACES)
def test_output_that_cannot_be_written_is_one_sentence_anywhere(place, number, settings, two, tmp_path):
    _fails_and_continues(MORE_PLACES[place], partial(full, number), os.strerror(number), settings, two, tmp_path)


@pytest.mark.slow
def test_a_full_disk_of_another_process_is_told_by_the_main_one(settings, tmp_path):
    act = ("mllm_keeplora.eval.harness:Journal.add", 1, full)
    ended = run_on_two(settings(tmp_path / "run", ("Alpha",)), tmp_path / "told", {1: act})
    assert [each.code for each in ended] == [74, 74], ended
    assert "error: rank 1 of 2 on " in ended[0].err and "No space left on device" in ended[0].err
    assert "Traceback" not in ended[0].err + ended[1].err


@pytest.fixture
def disk(tmp_path):
    """Function (size, *options) -> a small disk of its own, mounted anew with what it holds."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(size: str, *options: str) -> Path:
        again = ["remount"] if folder.is_mount() else []
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*again, f"size={size}", *options]), "none", str(folder)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("a disk can be mounted by root alone: real full and read-only disks are left unchecked")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_full_again_and_again_ends_as_on_a_large_one(disk, settings, two, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(disk("4k") / "run")))
    failures, kilobytes = 0, 4
    while (said := command_in_child("run", tmp_path / "run.yaml")).code != 0:
        assert said.code == 74 and "Traceback" not in said.err, said
        assert said.err.count("error: ") == 1 and said.err.count(" cannot be written: ") == 1
        failures, kilobytes = failures + 1, kilobytes * 5 // 4 + 4
        assert failures < 40
        disk(f"{kilobytes}k")
    assert failures > 5
    assert differing(tmp_path / "disk/run", two) == [] and leftovers(tmp_path / "disk/run") == []


def test_a_read_only_run_is_shown_and_its_page_refused_in_a_sentence(disk, two, tmp_path):
    run = disk("8m") / "run"
    shutil.copytree(two, run)
    before = (run / "results.json").read_bytes()
    disk("8m", "ro")
    said = command_in_child("report", run, "--export", tmp_path / "tables")
    _told(said, "Read-only file system")
    assert "Alpha" in said.out and (tmp_path / "tables").is_dir() and (run / "results.json").read_bytes() == before
    for words in (("eval", run), ("rescore", run), ("export", run, run / "merged")):
        _told(command_in_child(*words), "Read-only file system")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**yaml.safe_load((run / "config.yaml").read_text())}))
    _told(command_in_child("run", tmp_path / "run.yaml", f"output={run}"), "Read-only file system")
    _told(command_in_child("run", tmp_path / "run.yaml", f"output={run.parent}/other"), "Read-only file system")
