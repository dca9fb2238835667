"""Runs that share a folder ask the untouched base once: whoever comes second takes over answers, figures and cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.runs import RunDir
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.stages import evaluate as evaluating
from mllm_keeplora.system import files
from tests.integration.processes import run_on_two
from tests.support.tiny import tiny_benchmark

BASE = "domains/00_base/predictions"


@pytest.fixture
def base_asked(monkeypatch) -> list[str]:
    """Sets that the base was asked, in order."""
    asked, evaluate = [], evaluating.evaluate_named

    def counted(base, model, benchmark, name, config, folder):
        if folder.path.name == "00_base":
            asked.append(name)
        return evaluate(base, model, benchmark, name, config, folder)

    monkeypatch.setattr(evaluating, "evaluate_named", counted)
    return asked


@pytest.fixture
def shared_run(settings, world, tmp_path):
    """Function (name, base=None, **changes) -> a run over one domain that shares the base's answers."""

    def run(name: str, base: Path | None = None, **changes) -> RunDir:
        evaluation = {"base_answers": str(tmp_path / "shared"), **changes.pop("eval", {})}
        train, strategy = {"epochs": 1, **changes.pop("train", {})}, {"name": "finetune", **changes.pop("strategy", {})}
        values = settings(
            tmp_path / name, ("Alpha",), eval=evaluation, train=train, diagnostics={"samples": 0}, **changes
        )
        values["strategy"] = {"rank": 4, **strategy}
        values["base"]["model"] = str(base or world / "base")
        run_sequence(parse_config(values, origin="test"))
        return RunDir(tmp_path / name).load()

    return run


def _base_stages(run: RunDir) -> dict[str, tuple[float, float]]:
    stages = run.ledger.stages.items()
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


def test_nothing_is_taken_over_that_was_asked_otherwise(shared_run, base_asked, world, tmp_path):
    """Fewer questions, other batches, a question less in the file, other weights in the same folder."""
    base = shutil.copytree(world / "base", tmp_path / "base")
    shared_run("first", base)

    def asks_again(name: str, **changes) -> bool:
        before = len(base_asked)
        shared_run(name, base, **changes)
        return "Alpha" in base_asked[before:]

    assert not asks_again("same")
    assert asks_again("limit", eval={"limit": 3})
    assert asks_again("batches", eval={"batch_size": 2})
    data = shutil.copytree(world / "data", tmp_path / "data")
    rows = files.read_json(data / "Alpha" / "test.json")
    files.write_json(data / "Alpha" / "test.json", rows[:-1])
    assert asks_again("questions", benchmark=tiny_benchmark(data))
    shutil.copy(world / "other_base" / "model.safetensors", base)
    assert asks_again("weights")


@pytest.mark.parametrize("lost", ["facts.json", "Alpha.jsonl"])
def test_answers_that_are_not_whole_are_asked_again(lost, shared_run, base_asked, tmp_path):
    first = shared_run("first")
    before = len(base_asked)
    [path] = (tmp_path / "shared").glob(f"Alpha-*/{lost}")
    path.write_text("[")
    second = shared_run("second")
    assert base_asked[before:] == ["Alpha"]
    assert (second.path / BASE / "Alpha.jsonl").read_bytes() == (first.path / BASE / "Alpha.jsonl").read_bytes()


def test_answers_are_shared_but_not_scores(shared_run, tmp_path):
    """As after a change of the scoring rules: what was kept was graded by others."""
    first = shared_run("first")
    [path] = (tmp_path / "shared").glob("Alpha-*/Alpha.jsonl")
    rows = files.read_json_lines(path)
    files.write_json_lines(path, [{**row, "score": 1 - row["score"]} for row in rows])
    second = shared_run("second")
    assert _base_stages(second) == _base_stages(first)
    assert (second.path / BASE / "Alpha.jsonl").read_bytes() == (first.path / BASE / "Alpha.jsonl").read_bytes()


def test_a_folder_that_takes_nothing_is_told_and_holds_nothing_up(shared_run, tmp_path):
    (tmp_path / "shared").write_text("no folder")
    run = shared_run("first")
    told = run.log_file.read_text()
    assert "the base's answers are not kept for other runs" in told and str(tmp_path / "shared") in told
    assert (run.path / BASE / "Alpha.jsonl").is_file()


@pytest.mark.slow
def test_two_processes_agree_to_take_over(settings, tmp_path):
    evaluation = {"base_answers": str(tmp_path / "shared")}
    ledgers = []
    for name in ("first", "second"):
        values = settings(tmp_path / name, ("Alpha",), eval=evaluation)
        ended = run_on_two(values, tmp_path / f"told_{name}")
        assert [each.code for each in ended] == [0, 0], ended
        ledgers.append(_base_stages(RunDir(tmp_path / name).load()))
    assert ledgers[0] == ledgers[1] and ledgers[0]
    first, second = (tmp_path / name / BASE / "Alpha.jsonl" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
