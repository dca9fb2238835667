"""What a run leaves when it is refused, and what it takes over from a parent."""

from __future__ import annotations

import json
import shutil

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.sequence import run_sequence
from tests.integration.processes import differing, results, run_in_child
from tests.support.tiny import tiny_benchmark


def test_a_run_killed_between_the_files_of_its_first_gradient_ends_as_if_uninterrupted(settings, two, tmp_path):
    values = settings(tmp_path / "run")
    assert run_in_child(values, kill=("rename:01_Alpha/gradient.json", 1)) == -9
    assert run_in_child(values) == 0
    assert differing(tmp_path / "run", two) == []


def test_a_refused_start_makes_no_folder(settings, two, tmp_path):
    with pytest.raises(UserError, match="between 1 and 2"):
        run_sequence(parse_config(settings(tmp_path / "next"), "test"), from_run=two, after=3)
    assert not (tmp_path / "next").exists()


def test_a_foreign_folder_is_left_as_it_was(settings, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty and holds no run"):
        run_sequence(parse_config(settings(tmp_path / "mine"), "test"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_new_domain_of_the_same_name_is_not_graded_by_the_parents_answers(settings, three, world, tmp_path):
    values = settings(tmp_path / "next", ("Alpha", "Gamma"))
    rows = json.loads((world / "data" / "Gamma" / "test.json").read_text())
    shutil.copytree(world / "data" / "Gamma", tmp_path / "Gamma")
    (tmp_path / "Gamma" / "test.json").write_text(json.dumps(rows[:4]))
    values["benchmark"]["domains"]["Gamma"] = {k: f"{tmp_path}/Gamma/{k}.json" for k in ("train", "test")}
    run_sequence(parse_config(values, "test"), from_run=three, after=1)
    answered = (tmp_path / "next/domains/00_base/predictions/Gamma.jsonl").read_text().splitlines()
    assert len(answered) == 4


def test_nothing_of_the_parents_later_domains_is_inherited(settings, three, two, tmp_path):
    run_sequence(parse_config(settings(tmp_path / "next"), "test"), from_run=three, after=1)
    assert differing(tmp_path / "next", two) == []
    assert results(tmp_path / "next")["questions"].keys() == {"Alpha", "Beta", "general"}
    with pytest.raises(UserError, match=r"was started from .* after 1 domains, not 2"):
        run_sequence(parse_config(settings(tmp_path / "next"), "test"), from_run=three, after=2)


def test_a_domain_that_is_appended_to_a_finished_run_is_looked_into_before_it_is_learnt(settings, two, world, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    data = shutil.copytree(world / "data", tmp_path / "data")
    (data / "Gamma" / "images" / "train_5.png").unlink()
    values = settings(run, ("Alpha", "Beta", "Gamma"), benchmark=tiny_benchmark(data))
    before = (run / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"train_5\.png' does not exist"):
        run_sequence(parse_config(values, "test"))
    assert (run / "run.json").read_bytes() == before
    shutil.copy(world / "data" / "Gamma" / "images" / "train_5.png", data / "Gamma" / "images" / "train_5.png")
    assert run_in_child(values) == 0


def test_a_run_of_an_older_version_that_recorded_less_of_its_domains_can_be_continued(settings, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    record = json.loads((run / "run.json").read_text("utf-8"))
    for part in [*record["domains"], *record["suites"]]:
        for key in ("image_mode", "references", "train_images", "epochs"):
            part["files"].pop(key, None)
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert run_in_child(settings(run, ("Alpha", "Beta", "Gamma"))) == 0
