"""A training under one cycle ends with the same bytes wherever it was stopped: by a kill, a bad number, under ZeRO."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from mllm_keeplora.system.files import read_tensors
from tests.integration.processes import differing, run_in_child, run_on_two

STEP_END = "mllm_keeplora.training.fit:Reporter.on_step_end"
TRAIN = {"schedule": "one_cycle", "checkpoint_steps": 2}
ENGINES = [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))]


def cycled(settings, output: Path, deepspeed: str | None = None, strategy=None, **train) -> dict:
    """A run over Alpha alone, of six optimizer steps."""
    values = settings(output, ("Alpha",), train={**TRAIN, **train}, deepspeed=deepspeed)
    values["eval"] = {**values["eval"], "zero_shot": False, "limit": 2}
    return {**values, "strategy": strategy, "plugins": ["tests.support.nonfinite"]} if strategy else values


def rates(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {row["optimizer_step"]: row["learning_rate"] for row in rows if "loss" in row}
    return [found[step] for step in sorted(found)]


def trained(run: Path) -> torch.Tensor:
    found = read_tensors(run / "domains/01_Alpha/adapter/adapter_model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found) if "lora_B" in name])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_within_the_cycle_ends_as_one_that_was_not(engine, settings, tmp_path):
    """Behind the second checkpoint, where beta 1 is on its way back, and at the very end of the training."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run_in_child(cycled(settings, whole, engine)) == 0
    values = cycled(settings, output, engine)
    for kill in ((STEP_END, 5), ("rename:adapter_model.safetensors", 1)):
        assert run_in_child(values, kill=kill) == -signal.SIGKILL
    assert run_in_child(values) == 0
    assert differing(output, whole) == []
    assert rates(output) == rates(whole) and len(rates(whole)) == 6


@pytest.mark.slow
def test_the_cycle_is_that_of_a_plain_training_under_deepspeed(settings, tmp_path):
    """Were beta 1 left as it is, the trained factors would be others."""
    for name, engine in (("plain", None), ("zero2", "zero2")):
        assert run_in_child(cycled(settings, tmp_path / name, engine)) == 0
    still = {"lr_scheduler_kwargs": {"cycle_momentum": False}}
    assert run_in_child(cycled(settings, tmp_path / "still", args=still)) == 0
    plain, zero, still = (trained(tmp_path / name) for name in ("plain", "zero2", "still"))
    assert (zero - plain).norm() < 1e-3 * plain.norm() < 0.1 * (still - plain).norm()
    assert rates(tmp_path / "zero2") == pytest.approx(rates(tmp_path / "plain"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "zero2"])
def test_two_processes_take_the_same_cycle_together(engine, settings, tmp_path):
    ended = run_on_two(cycled(settings, tmp_path / "two", engine), tmp_path / "told")
    assert [each.code for each in ended] == [0, 0], ended
    assert run_in_child(cycled(settings, tmp_path / "one")) == 0
    assert rates(tmp_path / "two") == pytest.approx(rates(tmp_path / "one"))
    torch.testing.assert_close(trained(tmp_path / "two"), trained(tmp_path / "one"), atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["skip(2)", "rollback"])
def test_steps_that_are_left_out_or_passed_over_are_steps_of_the_cycle(mode, engine, settings, tmp_path):
    """The last one, too, behind which there is none."""
    strategy = {"name": "stumbling", "at": [2, 5], "rank": 4, "alpha": 8}
    assert run_in_child(cycled(settings, tmp_path / "run", engine, strategy, on_nonfinite=mode)) == 0
    assert run_in_child(cycled(settings, tmp_path / "plain", engine, {**strategy, "at": []})) == 0
    told = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = {row["optimizer_step"]: row["learning_rate"] for row in told if "nonfinite" in row}
    assert events == pytest.approx({step: rates(tmp_path / "plain")[step] for step in (2, 5)})
    done = {row["optimizer_step"]: row["learning_rate"] for row in told if "loss" in row}
    expected = rates(tmp_path / "plain")
    assert done == pytest.approx({step: expected[step - 1] for step in done}) and len(done) >= 4
