"""After a power cut at any moment of a run, a checkpoint or an export, what counts as there is there, and whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.runs import RunDir
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.system import files
from mllm_keeplora.training.state import COMPLETE, _damaged
from tests.integration.processes import differing, results, run_in_child
from tests.support.power import Disk


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def recorded(settings, tmp_path_factory):
    """A run over two domains that saves a checkpoint every other step, its config, and every flush that it made."""
    root = tmp_path_factory.mktemp("power")
    values = settings(root / "run", train={"checkpoint_steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run_sequence(parse_config(values, origin="test"))
    return disk, root, values


def test_what_a_run_counts_as_done_outlives_a_power_cut_after_every_flush(recorded, tmp_path):
    disk, root, _ = recorded
    seen = set()
    for count in range(len(disk.flushes) + 1):
        target = tmp_path / str(count)
        disk.lay_out(count, root, target)
        run = RunDir(target / "run")
        if not run.exists():
            run.refuse_foreign_content()  # else the run could not be started again
        else:
            run.load()
            assert run.is_proven and run.faults() == [], count
            seen.update(run.ledger.stages)
        for mark in target.glob(f"run/domains/*/checkpoints/*/{COMPLETE}"):
            assert mark.stat().st_size and _damaged(mark.parent) is None, (count, mark)
            seen.add(mark.parent.name)
        shutil.rmtree(target)
    assert {"prepare", "01_Alpha/train", "02_Beta/consolidate", "checkpoint-2", "checkpoint-6"} <= seen
    assert len(disk.flushes) > 150


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_run_goes_on_after_a_power_cut_and_ends_the_same(recorded, tmp_path, share):
    disk, root, values = recorded
    disk.lay_out(int(share * len(disk.flushes)), root, tmp_path / "after")
    output = tmp_path / "after/run"
    assert run_in_child({**values, "output": str(output)}) == 0
    assert not differing(root / "run", output)
    assert results(output)["score_matrix"] == results(root / "run")["score_matrix"]


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_export_is_whole_or_absent(two, tmp_path, monkeypatch, form):
    disk = Disk(monkeypatch)
    root = tmp_path / "exports"
    export(two, form, root / "made/model")
    monkeypatch.undo()
    whole, found = contents(root / "made/model"), 0
    for count in range(len(disk.flushes) + 1):
        disk.lay_out(count, tmp_path, tmp_path / f"after_{count}")
        folder = tmp_path / f"after_{count}/exports/made/model"
        if folder.exists():
            assert contents(folder) == whole, count
            found += 1
        shutil.rmtree(tmp_path / f"after_{count}")
    assert found, "it is there in the end"


def test_a_file_is_flushed_before_it_gets_its_name_and_new_folders_are_kept(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    files.write_json(tmp_path / "a/b/c.json", {"x": 1})
    for count in range(len(disk.flushes)):
        disk.lay_out(count, tmp_path, tmp_path / f"after_{count}")
        assert not (tmp_path / f"after_{count}/a/b/c.json").exists()
    disk.lay_out(len(disk.flushes), tmp_path, tmp_path / "after")
    assert files.read_json(tmp_path / "after/a/b/c.json") == {"x": 1}
