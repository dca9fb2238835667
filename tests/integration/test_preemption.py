"""Told to stop by SIGTERM or SIGUSR1, a run ends with code 75 where nothing is lost; the next start continues it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.integration.processes import differing, leftovers, results, run_in_child, run_on_two, stages, told
from tests.support.tiny import tiny_benchmark, write_tiny_data

FIT, PROBES, LINALG = "mllm_keeplora.training.fit", "mllm_keeplora.probes.gradients", "mllm_keeplora.linalg"
ADD = "mllm_keeplora.eval.harness:Journal.add"
SENTENCE = "stopped on {}; the same command continues the run"

# where the signal comes -> (at which call, the stage that is not done)
PLACES = {
    "train": ((f"{FIT}:Reporter.on_step_end", 3), "01_Alpha/train"),
    "evaluate": ((f"+{ADD}", 7), "01_Alpha/evaluate/Alpha"),
}
MORE_PLACES = {
    **PLACES,
    "prepare": ((f"{LINALG}:principal_subspace", 5), "00_base/evaluate/Alpha"),
    "gradient": ((f"{PROBES}:mean_by_row", 4), "02_Beta/gradient"),
    "train_at_its_end": ((f"{FIT}:Reporter.on_step_end", 12), "02_Beta/train"),
    "consolidate": ((f"{LINALG}:Basis.missing", 3), "01_Alpha/diagnose"),
    "diagnose": (("mllm_keeplora.stages.diagnose:changes_of", 2), "02_Beta/diagnose"),
}


def steps(run: Path, domain_index: int = 0) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["optimizer_step"] for row in rows if row["domain_index"] == domain_index]


def _stopped_and_continued(settings, two, output: Path, number: int, where: tuple[str, int], undone: str) -> None:
    values = settings(output)
    code = 130 if number == signal.SIGINT else 75
    assert run_in_child(values, kill=where, act=partial(told, number)) == code
    order = stages(two)
    assert stages(output) == order[: order.index(undone)]
    assert list(output.rglob("*.tmp")) == []
    assert run_in_child(values) == 0
    assert differing(output, two) == []
    assert stages(output) == order
    assert results(output)["score_matrix"] == results(two)["score_matrix"]
    assert leftovers(output) == []


@pytest.mark.parametrize(
    ("place", "number"),
    [("train", signal.SIGTERM), ("train", signal.SIGINT), ("evaluate", signal.SIGUSR1), ("evaluate", signal.SIGHUP)],
)
def test_a_stopped_run_ends_as_if_uninterrupted(place, number, settings, two, tmp_path):
    _stopped_and_continued(settings, two, tmp_path / "run", number, *PLACES[place])
    if place == "train":
        assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6], "no step is done twice"


@pytest.mark.slow
@pytest.mark.parametrize("place", MORE_PLACES)
def test_a_run_stopped_in_another_stage_ends_as_if_uninterrupted(place, settings, two, tmp_path):
    number = signal.SIGUSR1 if place == "train" else signal.SIGTERM
    _stopped_and_continued(settings, two, tmp_path / "run", number, *MORE_PLACES[place])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_group_told_to_stop_ends_with_a_checkpoint(number, settings, tmp_path):
    """As `timeout` tells it, data loaders' workers too."""
    benchmark = tiny_benchmark(write_tiny_data(tmp_path / "data", train=400, test=2), suite=False)
    train = {"epochs": 9, "workers": 1, "checkpoint_steps": 1000}
    values = settings(tmp_path / "run", ("Alpha",), train=train, benchmark=benchmark)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "mllm_keeplora", "run", str(tmp_path / "run.yaml")]
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen(command, stderr=said, start_new_session=True)
        until = time.monotonic() + 600
        while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(run.pid, number)
        assert run.wait(60) == 75, (tmp_path / "said").read_text()
    assert list(tmp_path.glob("run/domains/01_Alpha/checkpoints/*/complete.json"))


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_one_of_two_processes_told_to_stop_stops_both_with_a_checkpoint(deepspeed, settings, tmp_path):
    values = settings(tmp_path / "run", ("Alpha",), deepspeed=deepspeed)
    act = partial(told, signal.SIGTERM)
    ended = run_on_two(values, tmp_path / "told", {1: (f"{FIT}:Reporter.on_step_end", 3, act)})
    assert [each.code for each in ended] == [75, 75], ended
    assert ended[0].err.splitlines()[-1] == SENTENCE.format("SIGTERM")
    assert "stopped on" not in ended[1].err and "Traceback" not in ended[1].err
    assert (tmp_path / "run/domains/01_Alpha/checkpoints/checkpoint-3/complete.json").is_file()

    ended = run_on_two(values, tmp_path / "told", {0: (ADD, 1, partial(told, signal.SIGUSR1))})
    assert [each.code for each in ended] == [75, 75], ended
    assert ended[0].err.count(SENTENCE.format("SIGUSR1")) == 1
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert stages(tmp_path / "run")[-1] == "01_Alpha/diagnose"

    ended = run_on_two(values, tmp_path / "told")
    assert [each.code for each in ended] == [0, 0], ended
    assert results(tmp_path / "run")["metrics"]["last"] is not None
    assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_launch_told_to_stop_ends_with_75_and_continues(number, settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run", ("Alpha",), train={"epochs": 60})))
    words = ["-m", "mllm_keeplora.system.launch", "--standalone", "--nproc_per_node", "2", "-m", "mllm_keeplora", "run"]
    command = [sys.executable, *words, str(tmp_path / "run.yaml")]
    with open(tmp_path / "said", "w") as said:
        launch = subprocess.Popen(command, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 600
        while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
        launch.send_signal(number)
        assert launch.wait(60) == (130 if number == signal.SIGINT else 75)
    sentence = SENTENCE.format(signal.Signals(number).name).replace(" on SIGINT", "")
    assert (tmp_path / "said").read_text().count(sentence) == 1
    done = steps(tmp_path / "run")
    assert 0 < len(done) < 180
    assert subprocess.run(command, capture_output=True, timeout=900).returncode == 0
    assert steps(tmp_path / "run") == list(range(1, 181))
