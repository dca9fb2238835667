"""What results.json tells beside the scores: settings, what was measured on, scores by question type."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.report.page import refresh_results
from tests.integration.processes import run_in_child


@pytest.fixture(scope="module")
def typed(settings, world, tmp_path_factory):
    """A run whose test questions name their types, graded on validation questions in another order."""
    root = tmp_path_factory.mktemp("typed")
    values = settings(root / "run", None, eval={"split": "validation"})
    for name, part in values["benchmark"]["domains"].items():
        rows = json.loads((world / "data" / name / "test.json").read_text())
        typed = [{**row, "type": "where" if row["text"].startswith("where") else "colour"} for row in rows]
        (root / f"{name}.json").write_text(json.dumps(typed))
        part |= {"validation": str(root / f"{name}.json"), "images": str(world / "data" / name)}
    values["benchmark"]["orders"] = {"back": ["Gamma", "Beta", "Alpha"]}
    values["domains"] = "back"
    assert run_in_child(values) == 0
    return root / "run"


def results_of(run):
    return json.loads((run / "results.json").read_text())


def test_results_tell_every_setting_but_name_and_seed(two):
    settings = results_of(two)["settings"]
    assert settings["strategy.name"] == "keeplora" and settings["train.lr"] == 3e-2
    assert not {"name", "seed", "output"} & settings.keys()


def test_results_tell_what_was_measured_on(two, typed):
    ours, theirs = results_of(two)["identity"], results_of(typed)["identity"]
    ledger = json.loads((two / "run.json").read_text())
    assert ours["base"] == theirs["base"] == ledger["base"]["fingerprint"]
    assert (ours["split"], theirs["split"]) == ("test", "validation")
    assert ours["data"] != theirs["data"] and ours["generator"] is None


def test_scores_by_type_add_up_to_the_score_of_the_domain(typed):
    results = results_of(typed)
    assert results["domains"] == ["Gamma", "Beta", "Alpha"] and results["general"] == {}
    for name, last, blind in zip(results["domains"], results["score_matrix"][-1], results["blind"], strict=True):
        for total, kinds in ((last, results["per_type"][name]), (blind, results["blind_per_type"][name])):
            assert set(kinds) == {"where", "colour"}  # asked in turn, so half of the questions each
            assert sum(kinds.values()) / 2 == pytest.approx(total)


def test_a_run_is_complete_when_everything_that_was_asked_is_measured(two, tmp_path):
    assert results_of(two)["complete"]
    copy = tmp_path / "copy"
    shutil.copytree(two, copy)
    ledger = json.loads((copy / "run.json").read_text())
    del ledger["stages"]["02_Beta/evaluate/general"]
    (copy / "run.json").write_text(json.dumps(ledger))
    assert not refresh_results(load_run(copy)).complete


def test_a_suite_of_ones_own_can_be_asked_of_a_run_graded_on_validation_questions(typed, world, command):
    rows = json.loads((world / "data/Alpha/test.json").read_text())
    suite = world / "data/Alpha/own.json"
    suite.write_text(json.dumps(rows[:2]))
    said = command("eval", typed, "--suite", suite)
    assert said.code == 0 and said.out.startswith("own")


def test_a_run_from_before_the_split_was_a_key_can_be_continued(settings, tmp_path, two, command):
    copy = tmp_path / "copy"
    shutil.copytree(two, copy)
    ledger = json.loads((copy / "run.json").read_text())
    del ledger["config"]["eval.split"]
    (copy / "run.json").write_text(json.dumps(ledger))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(copy)))
    said = command("run", tmp_path / "run.yaml")
    assert said.code == 0, said.err


def test_questions_without_types_have_no_such_scores(two):
    assert results_of(two)["per_type"] == {}
