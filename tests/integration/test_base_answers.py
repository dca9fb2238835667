"""Runs that share a folder ask the untouched base once: whoever comes second takes over answers, figures and cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mllm_keeplora import files, sequence
from mllm_keeplora.config import parse_config
from mllm_keeplora.runs import RunDir
from mllm_keeplora.sequence import run_sequence
from tests.support.tiny import tiny_benchmark

BASE = "domains/00_base/predictions"


@pytest.fixture
def base_asked(monkeypatch) -> list[str]:
    """Sets that the base was asked, in order."""
    asked, evaluate = [], sequence.evaluate_named

    def counted(base, model, benchmark, name, config, folder):
        if folder.path.name == "00_base":
            asked.append(name)
        return evaluate(base, model, benchmark, name, config, folder)

    monkeypatch.setattr(sequence, "evaluate_named", counted)
    return asked


@pytest.fixture
def shared_run(settings, world, tmp_path):
    """Function (name, base=None, **changes) -> a run over one domain that shares the base's answers."""

    def run(name: str, base: Path | None = None, **changes) -> RunDir:
        evaluation = {"base_answers": str(tmp_path / "shared"), **changes.pop("eval", {})}
        values = settings(tmp_path / name, ("Alpha",), eval=evaluation, **changes)
        values["base"]["model"] = str(base or world / "base")
        run_sequence(parse_config(values, origin="test"))
        return RunDir(tmp_path / name).load()

    return run


def _base_stages(run: RunDir) -> dict[str, tuple[float, float]]:
    stages = run.record["stages"].items()
    return {name: (entry["score"], entry["seconds"]) for name, entry in stages if name.startswith("00_base/")}


def test_other_settings_and_another_seed_take_over_what_the_base_answered(shared_run, base_asked, two):
    first = shared_run("first")
    assert base_asked == [name.split("/")[2] for name in _base_stages(first)] and "Alpha" in base_asked
    second = shared_run("second", strategy={"rank": 2}, train={"lr": 1e-3}, seed=5)
    assert len(base_asked) == len(_base_stages(first)), "the second run asked again"
    assert _base_stages(second) == _base_stages(first)  # what asking took, too
    kept = sorted((first.path / BASE).iterdir())
    assert len(kept) == 2 * len(base_asked)
    for path in kept:
        assert (second.path / BASE / path.name).read_bytes() == path.read_bytes()
    assert (second.path / BASE / "Alpha.jsonl").read_bytes() == (two / BASE / "Alpha.jsonl").read_bytes()


@pytest.mark.parametrize("change", [{"limit": 3}, {"batch_size": 2}], ids=str)
def test_nothing_is_taken_over_that_was_asked_otherwise(change, shared_run, base_asked):
    shared_run("first")
    before = len(base_asked)
    shared_run("second", eval=change)
    assert "Alpha" in base_asked[before:]


def test_nothing_is_taken_over_of_other_weights(shared_run, base_asked, world, tmp_path):
    base = shutil.copytree(world / "base", tmp_path / "base")
    shared_run("first", base)
    before = len(base_asked)
    shutil.copy(world / "other_base" / "model.safetensors", base)
    shared_run("second", base)
    assert "Alpha" in base_asked[before:]


def test_nothing_is_taken_over_that_answers_other_questions(shared_run, base_asked, world, tmp_path):
    shared_run("first")
    before = len(base_asked)
    data = shutil.copytree(world / "data", tmp_path / "data")
    rows = files.read_json(data / "Alpha" / "test.json")
    files.write_json(data / "Alpha" / "test.json", rows[:-1])
    shared_run("second", benchmark=tiny_benchmark(data))
    assert "Alpha" in base_asked[before:]


def test_answers_that_were_not_kept_whole_are_asked_again(shared_run, base_asked, tmp_path):
    first = shared_run("first")
    before = len(base_asked)
    for path in (tmp_path / "shared").glob("Alpha-*/facts.json"):  # written last: a killed run left it out
        path.unlink()
    second = shared_run("second")
    assert base_asked[before:] == ["Alpha"]
    assert (second.path / BASE / "Alpha.jsonl").read_bytes() == (first.path / BASE / "Alpha.jsonl").read_bytes()
    assert len(list((tmp_path / "shared").glob("Alpha-*/facts.json"))) == 1
