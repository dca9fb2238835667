"""The run directory and its ledger: written whole, done once, held by one process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import threading

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.identity import differences
from mllm_keeplora.runs import BASE_UNIT, Ledger, RunDir, Unit
from mllm_keeplora.stages.units import plan_units, token_limit
from mllm_keeplora.system import files
from mllm_keeplora.training.seeds import stage_seed


def new_ledger() -> Ledger:
    sets = [{"name": name, "files": {"test": f"/data/{name}.json"}, "sha256": {"test": "00"}} for name in "AB"]
    return Ledger(
        name="x",
        created="2026-01-01T00:00:00Z",
        environment={},
        benchmark="two",
        base={"name": "tiny-llava", "fingerprint": None},
        seed=0,
        parent=None,
        config={"strategy.alpha": 1e-5},
        domains=[{**each, "train": {"lr": 1e-5}} for each in sets],
        units=[Unit(1, "A", ("A",)), Unit(2, "B", ("B",))],
        suites=[],
    )


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create(new_ledger())
    return run


def test_a_stage_is_done_once_and_entered_with_its_facts(run):
    calls = []
    assert run.once("prepare", lambda: calls.append(1) or {"layers": 3}) is True
    assert run.once("prepare", lambda: calls.append(1)) is False
    assert calls == [1]
    entry = RunDir(run.path).load().ledger.stages["prepare"]
    assert entry["layers"] == 3 and entry["seconds"] >= 0 and entry["peak_memory_bytes"] > 0


def test_a_stage_that_raises_is_not_entered(run):
    with pytest.raises(RuntimeError):
        run.once("prepare", _raise)
    assert not RunDir(run.path).load().is_done("prepare")
    assert run.once("prepare", lambda: None)


def _raise():
    raise RuntimeError("broken")


def test_finished_units_are_the_leading_ones_that_are_consolidated(run):
    assert run.finished_units == []
    run.once("02_B/consolidate", lambda: None)
    assert run.finished_units == []
    run.once("01_A/consolidate", lambda: None)
    assert [unit.name for unit in run.finished_units] == ["A", "B"]


def test_seconds_are_summed_by_kind_of_stage(run):
    run.ledger.stages = {
        name: {"seconds": seconds, "peak_memory_bytes": 5}
        for name, seconds in (("prepare", 1.0), ("01_A/evaluate/A", 2.0), ("01_A/evaluate/B", 3.5), ("02_B/train", 4.0))
    }
    assert run.seconds_by_kind() == {"prepare": 1.0, "evaluate": 5.5, "train": 4.0}


def test_notes_are_kept_with_their_time(run):
    run.note("hello")
    [note] = RunDir(run.path).load().ledger.notes
    assert note["text"] == "hello" and note["at"].endswith("Z")


def test_folders_of_units_are_numbered_and_the_base_is_zero(run):
    assert run.folder(BASE_UNIT).path.name == "00_base"
    assert run.folder(Unit(2, "Med", ("Med",))).predictions("RS") == run.path / "domains/02_Med/predictions/RS.jsonl"


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        RunDir(tmp_path).create(new_ledger())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", [".lock", "log.txt", "run.json.tmp"])
def test_what_a_run_killed_at_its_start_left_is_no_other_content(name, tmp_path):
    (tmp_path / name).write_text("")
    RunDir(tmp_path).create(new_ledger())


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ('{"format": 2}', "has format 2"), ("{}", "has format None")]
)
def test_a_ledger_that_cannot_be_read_is_refused(text, message, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=message):
        RunDir(tmp_path).load()


def test_a_ledger_reads_back_as_it_was_written_with_what_other_versions_entered(run):
    entered = json.loads(run.ledger_file.read_text()) | {"colour": "blue"}
    entered["domains"][0]["shade"] = "dark"
    run.ledger_file.write_text(json.dumps(entered))
    again = RunDir(run.path).load()
    assert (again.units, again.ledger.sets["A"]["train"]) == (new_ledger().units, {"lr": 1e-5})
    again.save()
    assert {**json.loads(run.ledger_file.read_text()), "sha256": None} == {**entered, "sha256": None}
    assert list(entered)[:4] == ["format", "stages", "notes", "name"]


def test_a_ledger_somebody_damaged_is_told_by_key_and_file(run):
    entered = json.loads(run.ledger_file.read_text())
    del entered["base"]["fingerprint"], entered["units"]
    run.ledger_file.write_text(json.dumps(entered))
    with pytest.raises(UserError) as error:
        RunDir(run.path).load()
    assert f"base.fingerprint is missing ({run.ledger_file})" in str(error.value)
    assert f"units is missing ({run.ledger_file})" in str(error.value)


def test_a_folder_without_ledger_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        RunDir(tmp_path).load()


def test_a_run_is_held_once(run):
    with run.locked():
        assert (run.path / ".lock").read_text() == f"{os.getpid()}@{socket.gethostname()}"
        assert run.user() == f"(pid {os.getpid()}) on {socket.gethostname()}"
        told = f"in use by another process (pid {os.getpid()}) on {socket.gethostname()}"
        with pytest.raises(UserError, match=re.escape(told)):
            RunDir(run.path).locked().__enter__()
    assert run.user() is None
    with run.locked():
        pass


def test_a_lock_that_another_machine_holds_is_told_with_machine_and_process(run, monkeypatch):
    with run.locked():
        (run.path / ".lock").write_text("77@node-of-others")
        with pytest.raises(UserError, match=r"in use by another process \(pid 77\) on node-of-others$"):
            RunDir(run.path).locked().__enter__()
        (run.path / ".lock").write_text("77")  # as an older version writes it
        with pytest.raises(UserError, match=r"in use by another process \(pid 77\)$"):
            RunDir(run.path).locked().__enter__()


def test_what_a_dead_process_of_this_machine_left_is_taken_over(run):
    """At once, and where something that it had started holds the lock a little longer."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run.path / ".lock").write_text(f"{ended.pid}@{socket.gethostname()}")
    holder = open(run.path / ".lock")  # noqa: SIM115
    fcntl.flock(holder, fcntl.LOCK_EX)
    threading.Timer(0.5, holder.close).start()
    with run.locked():
        assert holder.closed and run.user() == f"(pid {os.getpid()}) on {socket.gethostname()}"


def test_what_outlives_a_dead_process_for_long_is_told(run, monkeypatch):
    monkeypatch.setattr("mllm_keeplora.system.owners.GONE_S", 0.2)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run.path / ".lock").write_text(f"{ended.pid}@{socket.gethostname()}")
    with open(run.path / ".lock") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=rf"\(pid {ended.pid}\) on "):
            run.locked().__enter__()


def test_a_file_system_without_locks_is_told_and_not_taken_for_another_process(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"no lock on its file system .*No locks available.*another `output`"):
        run.locked().__enter__()


def test_differences_show_both_values():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}, "run") == [
        "b: 2 in run, 3 now",
        "c: 'absent' in run, 4 now",
    ]


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_absent(tmp_path):
    files.write_text(tmp_path / "deep" / "a.txt", "old")

    def half(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "deep" / "a.txt", half)
    assert (tmp_path / "deep" / "a.txt").read_text() == "old"
    files.remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_what_was_not_measured_is_null_and_never_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"score": None, "text": "é"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"score": None, "text": "é"}
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"score": float("nan")})
    assert files.read_json(tmp_path / "a.json")["score"] is None


def test_json_lines_read_back_what_was_written(tmp_path):
    rows = [{"a": "one\ntwo"}, {"b": "é"}]
    files.write_json_lines(tmp_path / "a.jsonl", rows)
    assert files.read_json_lines(tmp_path / "a.jsonl") == rows


def test_tensors_are_written_contiguous_and_equal_byte_for_byte(tmp_path):
    import torch

    tensor = torch.arange(6.0).reshape(2, 3)
    files.write_tensors(tmp_path / "a.safetensors", {"x": tensor.T})
    files.write_tensors(tmp_path / "b.safetensors", {"x": tensor.T.contiguous()})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert files.read_tensors(tmp_path / "a.safetensors")["x"].equal(tensor.T)


# -- units and seeds ---------------------------------------------------------------------------------------------


def test_units_of_a_stream():
    assert [unit.key for unit in plan_units(["A", "B"], "sequential")] == ["01_A", "02_B"]
    assert plan_units(["A", "B"], "union") == [Unit(1, "joint", ("A", "B"))]
    assert plan_units(["A", "B"], "none") == []


def test_a_batch_may_be_as_long_as_the_most_generous_domain_allows():
    values = {"name": "x", "base": {"model": "tiny-llava"}, "benchmark": "mini_dcl", "strategy": {"name": "replay"}}
    values |= {"train": {"max_length": 60}, "per_domain": {"B": {"train": {"max_length": 128}}}}
    config = parse_config(values, "test")
    assert [token_limit(names, config) for names in (["A"], ["B"], ["A", "B"])] == [60, 128, 128]
    values["per_domain"] = {"B": {"train": {"max_length": None}}}
    assert token_limit(["A", "B"], parse_config(values, "test")) is None


def test_seeds_differ_by_run_unit_and_stage_and_never_by_process():
    seeds = {stage_seed(seed, unit, stage) for seed in (0, 1) for unit in ("01_A", "02_B") for stage in ("train", "g")}
    assert len(seeds) == 8
    assert stage_seed(0, "01_A", "train") == 967326048  # moves every result if it moves
    assert all(0 <= seed < 2**31 for seed in seeds)
