"""One of two processes is killed or fails: the other ends too and names it, and the next start finishes the run."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.processes import killed, launched, leftovers, paused, run_on_two, stages

FIT, PROBES, LINALG = "mllm_keeplora.training.fit", "mllm_keeplora.probes.gradients", "mllm_keeplora.linalg"
CALLS = {  # stage -> what both processes call in it
    "prepare": (f"{LINALG}:principal_subspace", 2),
    "01_Alpha/gradient": (f"{PROBES}:mean_by_row", 1),
    "01_Alpha/train": (f"{FIT}:Reporter.on_step_end", 3),
    "01_Alpha/consolidate": (f"{LINALG}:Basis.missing", 1),
    "01_Alpha/diagnose": ("mllm_keeplora.stages.diagnose:changes_of", 1),
    "01_Alpha/evaluate/Alpha": ("mllm_keeplora.eval.harness:Journal.add", 1),
}
LAST = "01_Alpha/evaluate/general"


def fails() -> None:
    raise ValueError("made up\nof two lines")


def works_for_all() -> None:
    time.sleep(5)


def hangs() -> None:
    time.sleep(600)


def refused() -> None:
    from mllm_keeplora.errors import UserError

    raise UserError("a mistake that one process alone has found")


@pytest.fixture(scope="module")
def alone(settings) -> Callable:
    """Function (output) -> the config of a short run over Alpha."""

    def build(output: Path) -> dict:
        return settings(output, ("Alpha",), strategy={"grad_samples": 4, "feature_samples": 4})

    return build


@pytest.fixture(scope="module")
def whole(alone, tmp_path_factory) -> Path:
    """A run over Alpha by two processes. Read only."""
    folder = tmp_path_factory.mktemp("both")
    ended = run_on_two(alone(folder / "run"), folder)
    assert [each.code for each in ended] == [0, 0], ended
    return folder / "run"


@pytest.fixture
def before(whole, tmp_path) -> Callable:
    """Function (stage) -> a copy of the run as it was when that stage began."""

    def rewind(stage: str) -> Path:
        run = shutil.copytree(whole, tmp_path / "run")
        record = json.loads((run / "run.json").read_text())
        done = list(record["stages"])
        for name in done[done.index(stage) :]:
            del record["stages"][name]
        (run / "run.json").write_text(json.dumps(record))
        (run / "results.json").unlink()
        return run

    return rewind


def _finishes(values: dict, folder: Path, run: Path, whole: Path) -> None:
    ended = run_on_two(values, folder)
    assert [each.code for each in ended] == [0, 0], ended
    assert stages(run) == stages(whole)
    assert leftovers(run) == []


def _checked(stage: str, failing: int, act: Callable, alone, before, whole, tmp_path) -> None:
    run, other = before(stage), 1 - failing
    values = alone(run)
    ended = run_on_two(values, tmp_path / "told", {failing: (*CALLS[stage], act)})
    name = f"rank {failing} of 2 on {socket.gethostname()}"
    how = "failed in" if act is fails else "ended without a word in"
    sentence = re.compile(rf"^{re.escape(name)} {how} stage {stage}: .*$", re.MULTILINE)
    assert ended[other].code == 1 and ended[other].after < 60, ended[other]
    assert len(sentence.findall(ended[other].err)) == 1, ended[other].err
    assert "Traceback" not in ended[other].err
    if act is not fails:
        assert ended[failing].code == -9
        assert act is killed or ended[other].after == 0, "the other process waited for one that gave no sign of life"
    else:
        assert ended[failing].code == 1
        said = sentence.search(ended[failing].err)
        assert said[0].endswith("ValueError: made up")
        assert ended[failing].err[said.end() :].startswith("\nTraceback (most recent call last):\n")
    assert stage not in stages(run)
    _finishes(values, tmp_path / "told", run, whole)


@pytest.mark.parametrize(
    ("stage", "failing", "act"),
    [("01_Alpha/train", 1, killed), pytest.param("01_Alpha/evaluate/Alpha", 0, fails, marks=pytest.mark.slow)],
)
def test_a_failing_process_ends_the_other_one(stage, failing, act, alone, before, whole, tmp_path):
    _checked(stage, failing, act, alone, before, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("act", [killed, fails])
@pytest.mark.parametrize("stage", CALLS)
def test_a_failing_process_ends_the_other_one_in_any_stage(stage, failing, act, alone, before, whole, tmp_path):
    _checked(stage, failing, act, alone, before, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "failing"), [("01_Alpha/train", 1), ("01_Alpha/evaluate/Alpha", 0)])
def test_a_process_that_gives_no_sign_of_life_ends_the_other_one(stage, failing, alone, before, whole, tmp_path):
    _checked(stage, failing, paused, alone, before, whole, tmp_path)


WATCHED = """
import sys
from mllm_keeplora.system import watch
from mllm_keeplora.system.distributed import process_group
bound = []
with process_group():
    sys.addaudithook(lambda event, what: bound.append(what) if event == "socket.bind" else None)
    with watch.watched():
        assert bound == [], f"the watch listens at {bound}"
"""


@pytest.mark.slow
def test_processes_that_watch_each_other_open_no_port(tmp_path):
    launched(WATCHED, tmp_path)


@pytest.mark.slow
def test_a_process_that_hangs_in_a_training_is_not_waited_for_but_one_that_works_for_all_is(alone, before, tmp_path):
    run = before("01_Alpha/gradient")
    acts = {0: (*CALLS["01_Alpha/gradient"], works_for_all), 1: (*CALLS["01_Alpha/train"], hangs)}
    ended = run_on_two({**alone(run), "distributed_timeout_s": 2}, tmp_path / "told", acts)
    assert [each.code for each in ended] == [1, 1] and max(each.after for each in ended) < 5, ended
    assert f"rank 0 of 2 on {socket.gethostname()} failed in stage 01_Alpha/train: " in ended[0].err
    assert f"rank 0 of 2 on {socket.gethostname()} failed in stage 01_Alpha/train: " in ended[1].err
    assert "2000ms" in ended[0].err and "2000ms" in ended[1].err
    assert "Traceback" in ended[0].err and "Traceback" not in ended[1].err
    assert stages(run)[-1] == "01_Alpha/gradient"


def test_a_mistake_of_the_user_is_told_once_by_the_main_process(alone, before, tmp_path):
    run = before(LAST)
    ended = run_on_two({**alone(run), "seed": 5}, tmp_path / "told")
    assert [each.code for each in ended] == [2, 2]
    assert ended[0].err.count("error: ") == 1 and "seed: 0 in" in ended[0].err
    assert "error" not in ended[1].err and "Traceback" not in ended[0].err + ended[1].err


@pytest.mark.slow
def test_a_mistake_that_another_process_alone_has_found_is_told_by_the_main_one(alone, before, tmp_path):
    run = before(LAST)
    ended = run_on_two(alone(run), tmp_path / "told", {1: ("mllm_keeplora.eval.harness:Journal.add", 1, refused)})
    assert [each.code for each in ended] == [2, 2], ended
    told = f"error: rank 1 of 2 on {socket.gethostname()}: a mistake that one process alone has found"
    assert told in ended[0].err.splitlines() and "error" not in ended[1].err
