"""Killed with SIGKILL inside any stage, the same call ends with the same bytes as a run that nobody touched."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.sequence import run_sequence
from tests.integration.processes import artefacts, differing, leftovers, results, run_in_child, stages

FIT, PROBES, LINALG = "mllm_keeplora.training.fit", "mllm_keeplora.probes.gradients", "mllm_keeplora.linalg"
HARNESS = "mllm_keeplora.eval.harness"

# what is killed -> (at which call, the last stage that is done, the stage that is not)
KILLS = {
    "prepare": ((f"{LINALG}:principal_subspace", 5), None, "prepare"),
    "gradient_half_way": (
        (f"{PROBES}:per_sample_loss", 4),
        "01_Alpha/evaluate/general",
        "02_Beta/gradient",
    ),
    "train_after_a_checkpoint": ((f"{FIT}:Reporter.on_step_end", 9), "02_Beta/gradient", "02_Beta/train"),
    "checkpoint_without_optimizer_state": ((f"+{FIT}:DomainTrainer._save", 5), "02_Beta/gradient", "02_Beta/train"),
    "consolidate_between_two_layers": ((f"{LINALG}:Basis.missing", 3), "01_Alpha/train", "01_Alpha/consolidate"),
    "evaluate_half_way_through_a_set": (
        (f"{HARNESS}:Journal.add", 8),
        "01_Alpha/diagnose",
        "01_Alpha/evaluate/Alpha",
    ),
}
MORE_KILLS = {
    "diagnose_before_its_file": (
        ("rename:02_Beta/diagnostics.json", 1),
        "02_Beta/consolidate",
        "02_Beta/diagnose",
    ),
    "start_before_the_ledger_is_there": (("rename:run.json", 1), None, "prepare"),
    "prepare_while_its_file_is_written": (("rename:prepare/basis.safetensors", 1), None, "prepare"),
    "gradient_between_its_two_files": (
        ("rename:02_Beta/gradient.json", 1),
        "01_Alpha/evaluate/general",
        "02_Beta/gradient",
    ),
    "checkpoint_before_it_is_complete": (("rename:complete.json", 2), "01_Alpha/gradient", "01_Alpha/train"),
    "train_between_two_adapter_files": (("rename:adapter_model.safetensors", 2), "02_Beta/gradient", "02_Beta/train"),
    "consolidate_after_its_basis_is_written": (
        ("rename:01_Alpha/gradient.json", 2),
        "01_Alpha/train",
        "01_Alpha/consolidate",
    ),
    "consolidate_before_it_is_entered": (
        ("+mllm_keeplora.stages.learner:Learner.consolidate", 1),
        "01_Alpha/train",
        "01_Alpha/consolidate",
    ),
    "evaluate_before_predictions_are_there": (
        ("rename:predictions/Beta.jsonl", 3),
        "02_Beta/evaluate/Alpha",
        "02_Beta/evaluate/Beta",
    ),
    "report": (("rename:results.json", 1), "02_Beta/evaluate/general", None),
}


def _killed_and_continued(settings, two, output, kill, done, undone) -> None:
    values = settings(output)
    assert run_in_child(values, kill=kill) == -signal.SIGKILL
    if (output / "run.json").is_file():
        reached = stages(output)
        assert (reached[-1] if reached else None) == done
        assert undone not in reached
    else:
        assert done is None
    assert not (output / "results.json").exists()

    assert run_in_child(values) == 0
    assert differing(output, two) == []
    assert results(output)["score_matrix"] == results(two)["score_matrix"]
    assert results(output)["metrics"] == results(two)["metrics"]
    assert stages(output) == stages(two)
    assert leftovers(output) == []


@pytest.mark.parametrize("name", KILLS)
def test_a_run_killed_inside_a_stage_ends_as_if_uninterrupted(name, settings, two, tmp_path):
    _killed_and_continued(settings, two, tmp_path / "run", *KILLS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_KILLS)
def test_a_run_killed_between_two_writes_ends_as_if_uninterrupted(name, settings, two, tmp_path):
    _killed_and_continued(settings, two, tmp_path / "run", *MORE_KILLS[name])


@pytest.mark.slow
def test_a_training_that_ends_within_an_epoch_is_not_trained_further(settings, tmp_path):
    train = {"epochs": 1.5, "schedule": "constant"}
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run_in_child(settings(whole, train=train)) == 0
    between = ("rename:adapter_model.safetensors", 2)
    assert run_in_child(settings(output, train=train), kill=between) == -signal.SIGKILL
    assert run_in_child(settings(output, train=train)) == 0
    assert differing(output, whole) == []
    assert [
        json.loads((run / "run.json").read_text())["stages"]["02_Beta/train"]["steps"] for run in (output, whole)
    ] == [5, 5]


@pytest.mark.slow
def test_a_run_killed_again_and_again_gets_to_the_same_end(settings, two, tmp_path):
    values, kills = settings(tmp_path / "run"), 0
    while (code := run_in_child(values, kill=("rename:", 14))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 40, "no progress"
    assert kills > 3
    assert differing(tmp_path / "run", two) == []
    assert leftovers(tmp_path / "run") == []


def test_training_continues_at_the_checkpoint_and_not_at_its_start(settings, two, tmp_path):
    values = settings(tmp_path / "run")
    assert run_in_child(values, kill=(f"{FIT}:Reporter.on_step_end", 5)) == -signal.SIGKILL
    checkpoints = tmp_path / "run" / "domains" / "01_Alpha" / "checkpoints"
    assert sorted(path.parent.name for path in checkpoints.glob("*/complete.json")) == ["checkpoint-2", "checkpoint-4"]
    before = _steps(tmp_path / "run", domain_index=0)

    assert run_in_child(values, kill=("rename:adapter_config.json", 1)) == -signal.SIGKILL
    assert before == [1, 2, 3, 4]
    assert _steps(tmp_path / "run", domain_index=0) == [1, 2, 3, 4, 5, 6]


def test_uninterrupted_runs_are_equal_and_leave_nothing_unfinished(settings, two, tmp_path):
    assert run_in_child(settings(tmp_path / "run")) == 0
    assert differing(tmp_path / "run", two) == []
    names = artefacts(two)
    assert sum(name.endswith(".jsonl") for name in names) == 9  # base, Alpha, Beta x Alpha, Beta, general
    assert sum(name.endswith("init.safetensors") for name in names) == 2
    assert leftovers(two) == []


def test_a_finished_run_is_not_done_again_and_loads_no_model(settings, two, tmp_path, monkeypatch):
    run = shutil.copytree(two, tmp_path / "run")
    values = settings(run)
    run_sequence(parse_config(values, origin="test"))  # takes note of the copy's new `output`
    before = _content(run)
    monkeypatch.setattr("mllm_keeplora.stages.learner.load_base", _not_to_be_called)
    again = run_sequence(parse_config(values, origin="test"))
    assert again.score_matrix == results(two)["score_matrix"]
    assert _content(run) == before
    assert differing(run, two) == []


def _not_to_be_called(*args, **keywords):
    raise AssertionError("a finished run needs no model")


def _content(run) -> dict[str, bytes]:
    paths = [path for path in run.rglob("*") if path.is_file() and path.name not in {"log.txt", ".lock"}]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def _steps(run, domain_index: int) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["optimizer_step"] for row in rows if row["domain_index"] == domain_index]
