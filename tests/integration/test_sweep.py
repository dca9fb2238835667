"""A whole sweep over a tiny benchmark: it tunes on validation questions, runs seeds, compares, and is never redone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mllm_keeplora.runs import RunDir
from tests.integration.commands import content, shell

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """A finished sweep of two strategies over two rates and two seeds, with its YAML and what was said."""
    root = tmp_path_factory.mktemp("sweep")
    run = settings(root / "unused")
    for part in run["benchmark"]["domains"].values():
        part["validation"] = part["test"]
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    sweep = {
        "name": "tiny",
        "run": str(root / "run.yaml"),
        "strategies": {"finetune": ["strategy.name=finetune"], "keeplora": []},
        "tune": {"grid": [1e-2, 2e-2], "extensions": 0},
        "final": {"seeds": [1, 2]},
        "output": str(root / "out"),
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    said = shell("sweep", root / "sweep.yaml", "--jobs", "2")
    assert said.code == 0, said.err + said.out
    return root, said


def test_a_sweep_leaves_choice_table_and_pictures(swept):
    root, said = swept
    out = root / "out"
    record = json.loads((out / "sweep.json").read_text())
    for label in ("finetune", "keeplora"):
        tried = record["tuning"][label]["tried"]
        assert set(tried) == {"0.01", "0.02"}
        best = max(tried.values())
        assert tried[f"{record['tuning'][label]['chosen']:g}"] == best
    assert len(list(out.glob("tune/*/results.json"))) == len(list(out.glob("final/*/results.json"))) == 4
    assert "±" in (out / "tables.md").read_text() and "seed by seed" in (out / "tables.md").read_text()
    assert (out / "score_matrices.png").stat().st_size > 5000 and (out / "trade_off.png").stat().st_size > 5000
    page = (out / "report.html").read_text()
    assert "What was measured" in page and "the highest Last is chosen. The chosen" in page  # it may not go on
    assert "finetune" in said.out and "keeplora" in said.out


def test_tuning_saw_validation_questions_of_seen_domains_and_no_suite(swept):
    root, _ = swept
    for path in (root / "out").glob("tune/*/results.json"):
        results = json.loads(path.read_text())
        assert results["identity"]["split"] == "validation"
        assert results["general"] == {} and results["score_matrix"][0][1] is None


def test_final_runs_share_what_the_base_answers(swept):
    root, _ = swept
    ledgers = [json.loads(path.read_text())["stages"] for path in (root / "out").glob("final/*/run.json")]
    asked = {name for stages in ledgers for name in stages if name.startswith("00_base/evaluate/")}
    assert len(asked) == len(list((root / "out" / "base_answers").glob("*/facts.json"))) == 3
    for name in asked:  # what asking took tells who asked: at most those two that ran side by side at first
        assert len({stages[name]["seconds"] for stages in ledgers}) <= 2


def test_a_finished_sweep_is_not_run_again(swept):
    root, _ = swept
    before = {name: data for name, data in content(root / "out").items() if "/" in name}
    said = shell("sweep", root / "sweep.yaml")
    assert said.code == 0, said.err
    assert {name: data for name, data in content(root / "out").items() if "/" in name} == before


def test_compare_takes_a_sweep_folder_and_single_runs(swept, command):
    root, _ = swept
    said = command("compare", root / "out", "--output", root / "again")
    assert said.code == 0 and "finetune" in said.out and "±" in said.out
    assert (root / "again" / "report.html").is_file()
    one = next((root / "out").glob("final/keeplora-*-seed1"))
    assert command("compare", one, one / "results.json").code == 2  # the same run twice


def test_a_run_that_fails_is_told_with_its_log(swept, tmp_path):
    root, _ = swept
    values = yaml.safe_load((root / "sweep.yaml").read_text())
    values |= {"output": str(tmp_path / "out"), "strategies": {"finetune": ["strategy.name=finetune"]}}
    values["tune"] |= {"grid": [1e30], "key": "train.lr"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    said = shell("sweep", tmp_path / "sweep.yaml")
    assert said.code == 2 and f"no run gave a result; see {tmp_path / 'out'}/tune/*.log" in said.err
    assert "loss is" in (tmp_path / "out" / "tune" / "finetune-1e+30.log").read_text()


@pytest.fixture
def begun(swept, tmp_path):
    """A sweep of one strategy whose first run has just begun to train: its process, YAML and the run's folder."""
    root, _ = swept
    values = yaml.safe_load((root / "sweep.yaml").read_text())
    values |= {"output": str(tmp_path / "out"), "strategies": {"finetune": ["strategy.name=finetune"]}}
    values["tune"] |= {"grid": [1e-2], "overrides": ["eval.split=validation", "train.epochs=40"]}
    values["final"] = {"seeds": [1]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "out" / "tune" / "finetune-0.01"
    process = subprocess.Popen([sys.executable, "-m", "mllm_keeplora", "sweep", str(tmp_path / "sweep.yaml")])
    until = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    yield process, tmp_path / "sweep.yaml", run
    process.kill()


def steps(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["domain_index"], row["optimizer_step"]) for row in rows]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_ended_and_started_at_once_goes_on(begun, number):
    """Killed, it leaves a run that works on; told to stop, it lets that save what it has done."""
    process, sweep, run = begun
    process.send_signal(number)
    assert process.wait(300) == (-9 if number == signal.SIGKILL else 75)
    if number == signal.SIGKILL:
        assert RunDir(run).user() is not None
    else:
        assert RunDir(run).user() is None and list(run.glob("domains/*/checkpoints/*/complete.json"))
    said = shell("sweep", sweep)
    assert said.code == 0, said.err
    assert ("waiting for (pid" in said.err) == (number == signal.SIGKILL) and "failed" not in said.err
    assert steps(run) == [(domain, step) for domain in (0, 1) for step in range(1, 121)], "nothing was done twice"


def test_a_finished_run_over_other_pictures_is_not_taken_for_this_sweep_s(swept, world, tmp_path):
    root, _ = swept
    shutil.copytree(root / "out", tmp_path / "out")
    picture = world / "data" / "Alpha" / "images" / "train_0.png"
    before = picture.read_bytes()
    try:
        picture.write_bytes((picture.with_name("train_1.png")).read_bytes())
        said = shell("sweep", root / "sweep.yaml", f"output={tmp_path}/out")
    finally:
        picture.write_bytes(before)
    assert said.code == 2 and "was made with other data or another base" in said.err
