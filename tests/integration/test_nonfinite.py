"""Numbers that are not finite: a training says so and stores nothing, leaves the step out, or goes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mllm_keeplora.system import files
from tests.integration.processes import command_in_child, differing, leftovers, run_in_child, run_on_two, stages

FIT = "mllm_keeplora.training.fit"
PLUGIN = "tests.support.nonfinite"
ALPHA = "domains/01_Alpha"


@pytest.fixture(scope="module")
def stumbling(settings) -> Callable:
    """Function (output, at, on_nonfinite="stop", by="loss", **changes) -> a run over Alpha of six optimizer steps."""

    def build(output: Path, at: list[int], on_nonfinite: str = "stop", by: str = "loss", rank_of: int = 0, **changes):
        strategy = {"name": "stumbling", "at": at, "by": by, "rank_of": rank_of, "rank": 4, "alpha": 8}
        changes["train"] = {"on_nonfinite": on_nonfinite, "checkpoint_steps": 2, **changes.get("train", {})}
        changes = {"zero_shot": False, **changes}
        evaluation = {"zero_shot": changes.pop("zero_shot"), "limit": 2}
        values = settings(output, ("Alpha",), eval=evaluation, plugins=[PLUGIN], **changes)
        return {**values, "strategy": strategy}

    return build


def events(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / ALPHA / "gradient.json").read_text()).get("nonfinite", [])


def rows(run: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {text}")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def factors(run: Path) -> dict[str, torch.Tensor]:
    return files.read_tensors(run / ALPHA / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("by", "at", "what", "step", "last"),
    [
        ("loss", 3, "Stumbling.extra_loss is nan", 3, "checkpoint-2"),
        ("gradient", 5, "the gradient is not finite", 5, "checkpoint-4"),
        ("factors", 5, "trained factors are not finite", 6, "checkpoint-4"),
        ("gradient", 0, "the gradient is not finite", 0, None),
    ],
)
def test_a_training_that_diverges_says_where_and_is_not_stored_as_done(by, at, what, step, last, stumbling, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stumbling(tmp_path / "run", [at], by=by)))
    for _ in range(2):  # the same command comes to the same end
        said = command_in_child("run", tmp_path / "run.yaml")
        assert said.code == 3 and "Traceback" not in said.err, said
        [sentence] = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert what in sentence and f"in domain Alpha, optimizer step {step}; the learning rate was 0" in sentence
        assert "(train.lr 0.03)" in sentence
        assert (f"{ALPHA}/checkpoints/{last}" if last else "there is no checkpoint yet") in sentence
        assert "lower train.lr" in sentence
        assert stages(tmp_path / "run")[-1] == "01_Alpha/gradient"
        assert not (tmp_path / "run" / ALPHA / "adapter").exists()


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_told_like_any_other_divergence(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(settings(tmp_path / "run", ("Alpha",), train={"lr": 1e30, "workers": 1}))
    )
    said = command_in_child("run", tmp_path / "run.yaml")
    assert said.code == 3 and "Traceback" not in said.err, said
    assert "in domain Alpha, optimizer step " in said.err and "1e+30" in said.err


@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_a_step_that_is_left_out_changes_nothing_and_is_recorded(by, stumbling, tmp_path):
    """The first step moves nothing then, so that five steps are done: their rates are the schedule's own."""
    output = tmp_path / "run"
    assert run_in_child(stumbling(output, [0, 3], "skip(2)", by)) == 0
    assert [(each["optimizer_step"], each["done"]) for each in events(output)] == [(0, "left out"), (3, "left out")]
    told = [row for row in rows(output) if "nonfinite" in row]
    assert [row["optimizer_step"] for row in told] == [0, 3]
    plain = tmp_path / "plain"
    assert run_in_child(stumbling(plain, [])) == 0
    rates = [[row["learning_rate"] for row in rows(run) if "loss" in row] for run in (output, plain)]
    assert rates[0] == rates[1] and len(rates[0]) == 6
    assert events(plain) == []
    assert all(tensor.isfinite().all() for tensor in factors(output).values())
    assert any(not torch.equal(*pair) for pair in zip(factors(output).values(), factors(plain).values(), strict=True))


def test_more_steps_than_are_allowed_end_the_run(stumbling, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stumbling(tmp_path / "run", [1, 3, 4], "skip(2)")))
    said = command_in_child("run", tmp_path / "run.yaml")
    assert said.code == 3 and "train.on_nonfinite skip(2) has left out 2 steps" in said.err, said
    assert not (tmp_path / "run" / ALPHA / "adapter").exists()


@pytest.mark.parametrize(
    ("by", "at", "expected"),
    [
        ("loss", [3], [(3, "back to checkpoint-2")]),
        ("gradient", [0, 5], [(0, "back to checkpoint-0"), (5, "back to checkpoint-4")]),
        ("factors", [5], [(6, "back to checkpoint-4")]),
    ],
)
def test_a_training_goes_back_to_a_checkpoint_and_passes_over_what_led_there(by, at, expected, stumbling, tmp_path):
    output = tmp_path / "run"
    assert run_in_child(stumbling(output, at, "rollback", by)) == 0
    assert [(each["optimizer_step"], each["done"]) for each in events(output)] == expected
    assert all(tensor.isfinite().all() for tensor in factors(output).values())
    assert leftovers(output) == []
    done = [row["optimizer_step"] for row in rows(output) if "loss" in row]
    assert done == {"loss": [1, 2, 3, 5, 6], "gradient": [2, 3, 4, 5], "factors": [1, 2, 3, 4, 5, 6]}[by]


def test_to_go_back_and_to_leave_out_are_the_same_right_behind_a_checkpoint(stumbling, tmp_path):
    for mode in ("rollback", "skip(1)"):
        assert run_in_child(stumbling(tmp_path / mode, [4], mode)) == 0
    assert differing(tmp_path / "rollback", tmp_path / "skip(1)") == [f"{ALPHA}/gradient.json"]


def test_a_training_that_goes_back_too_often_ends(stumbling, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stumbling(tmp_path / "run", [0, 1, 2, 3], "rollback")))
    said = command_in_child("run", tmp_path / "run.yaml")
    assert said.code == 3 and "train.on_nonfinite has rolled back 3 times" in said.err, said


@pytest.mark.parametrize("on_nonfinite", ["skip(3)", "rollback"])
@pytest.mark.parametrize(
    "kill",
    [
        ("+mllm_keeplora.training.nonfinite:Guard.save", 3),
        pytest.param((f"{FIT}:Reporter.on_step_end", 4), marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_behind_such_a_step_ends_as_one_that_was_not(on_nonfinite, kill, stumbling, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run_in_child(stumbling(whole, [1, 3], on_nonfinite)) == 0
    assert run_in_child(stumbling(output, [1, 3], on_nonfinite), kill=kill) == -9
    assert run_in_child(stumbling(output, [1, 3], on_nonfinite)) == 0
    assert differing(output, whole) == [] and events(output) == events(whole) != []


@pytest.mark.parametrize(
    "deepspeed", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3"))]
)
@pytest.mark.parametrize("on_nonfinite", [pytest.param("skip(3)", marks=pytest.mark.slow), "rollback"])
def test_processes_do_the_same_where_one_alone_sees_it(on_nonfinite, deepspeed, stumbling, tmp_path):
    values = stumbling(tmp_path / "run", [1, 3], on_nonfinite, rank_of=1, deepspeed=deepspeed)
    ended = run_on_two(values, tmp_path / "told")
    assert [each.code for each in ended] == [0, 0], ended
    assert run_in_child(stumbling(tmp_path / "alone", [1, 3], on_nonfinite)) == 0
    assert [each["done"] for each in events(tmp_path / "run")] == [each["done"] for each in events(tmp_path / "alone")]
    for mine, other in zip(factors(tmp_path / "run").values(), factors(tmp_path / "alone").values(), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_one_of_two_processes_that_diverges_ends_both_with_its_sentence(stumbling, tmp_path):
    ended = run_on_two(stumbling(tmp_path / "run", [1], rank_of=1), tmp_path / "told")
    assert [each.code for each in ended] == [3, 3], ended
    assert "error: rank 1 of 2 on " in ended[0].err and "extra_loss is nan in domain Alpha" in ended[0].err
    assert "Traceback" not in ended[0].err + ended[1].err


@pytest.mark.parametrize("wrong", ["skip", "skip(0)", "skip(-1)", "go on"])
def test_another_reaction_is_refused(wrong, stumbling, tmp_path, command):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stumbling(tmp_path / "run", [], wrong)))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 2
    assert (
        f"train.on_nonfinite: must be stop, rollback, or skip(K) with a whole number K of at least 1, got {wrong!r}"
        in (said.err)
    )


@pytest.mark.parametrize(
    "engine",
    [{"zero_optimization": {"stage": 0}}, {"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": False}}],
)
def test_a_step_that_deepspeed_would_take_is_refused_to_be_left_out(engine, stumbling, tmp_path, command):
    (tmp_path / "ds.json").write_text(json.dumps(engine))
    values = stumbling(tmp_path / "run", [], "skip(1)", deepspeed=str(tmp_path / "ds.json"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "strategy": {"name": "finetune"}, "plugins": []}))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 2 and "train.on_nonfinite skip(1): DeepSpeed " in said.err
