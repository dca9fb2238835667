"""What a user can mend and no check can foresee: a sentence that says what to change, and the run goes on."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from tests.integration.processes import command_in_child, interrupted, stages
from tests.support.tiny import tiny_benchmark, write_tiny_data

FIT = "mllm_keeplora.training.fit"


def without_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def not_finite() -> None:
    from mllm_keeplora.linalg.checks import as_float

    as_float(torch.full((2,), float("nan")), "features of layer q_proj")


def kill_readers() -> None:
    for child in psutil.Process().children():
        child.kill()


@pytest.mark.parametrize(
    ("place", "stage", "settings_named"),
    [
        ("mllm_keeplora.training.trainer:DomainTrainer.compute_loss", "01_Alpha/train", "train.micro_batch_size=2 ("),
        ("mllm_keeplora.probes.gradients:mean_by_row", "01_Alpha/gradient", "train.probe_batch_size=4 ("),
        ("mllm_keeplora.stages.diagnose:changes_of", "01_Alpha/diagnose", "train.probe_batch_size=4"),
    ],
)
def test_too_little_memory_names_the_stage_and_what_to_change(place, stage, settings_named, settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run", ("Alpha",))))
    said = command_in_child("run", tmp_path / "run.yaml", kill=(place, 1), act=without_memory)
    assert said.code == 2 and "Traceback" not in said.err, said
    [sentence] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert f"out of memory in stage {stage} (CUDA out of memory." in sentence and settings_named in sentence
    if stage.endswith("train"):
        assert "`check` expects 0." in sentence and "train.gradient_checkpointing=true" in sentence
        assert command_in_child("run", tmp_path / "run.yaml", "train.micro_batch_size=2").code == 0


def test_features_that_are_not_finite_are_a_divergence_too(settings, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run", ("Alpha",))))
    place = ("mllm_keeplora.probes.gradients:mean_by_row", 1)
    said = command_in_child("run", tmp_path / "run.yaml", kill=place, act=not_finite)
    assert said.code == 3 and "Traceback" not in said.err, said
    assert "error: stage 01_Alpha/gradient: features of layer q_proj must be finite" in said.err


@pytest.fixture
def reading(settings, tmp_path) -> Path:
    """The YAML of a run whose records are read by a process of its own; its data lie in `tmp_path`/data."""
    benchmark = tiny_benchmark(write_tiny_data(tmp_path / "data", train=80, test=2), suite=False)
    values = settings(tmp_path / "run", ("Alpha",), train={"workers": 1}, benchmark=benchmark)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "strategy": {"name": "finetune"}}))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_picture_that_has_vanished_since_the_check_is_named(workers, reading, tmp_path):
    gone = partial(shutil.rmtree, tmp_path / "data/Alpha/images", ignore_errors=True)
    place = ("rename:01_Alpha/gradient.json", 1)
    said = command_in_child("run", reading, f"train.workers={workers}", "base.tower_cache_mb=0", kill=place, act=gone)
    assert said.code == 2 and "Traceback" not in said.err, said
    [sentence] = [line for line in said.err.splitlines() if "error: " in line.lower()]
    assert sentence.startswith("error: ") and "train.json record " in sentence and " does not exist in " in sentence


def test_a_process_that_reads_and_is_killed_is_told_in_a_sentence(reading):
    said = command_in_child("run", reading, kill=(f"{FIT}:Reporter.on_step_end", 1), act=kill_readers)
    assert said.code == 2 and "Traceback" not in said.err, said
    assert "error: stage 01_Alpha/train: a process that reads records has ended (DataLoader worker" in said.err
    assert "lower train.workers" in said.err
    assert command_in_child("run", reading, "train.workers=0").code == 0


def test_a_collapse_is_told_in_log_results_and_page(settings, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    path = run / "domains/01_Alpha/predictions/Beta.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps({**row, 'prediction': row['answer']})}\n" for row in rows))
    assert command_in_child("rescore", run).code == 0  # by which the run takes these answers for its own
    record = json.loads((run / "run.json").read_text())
    record["stages"]["01_Alpha/evaluate/Beta"]["score"] = 100.0
    now = record["stages"].pop("02_Beta/evaluate/Beta")["score"]
    (run / "run.json").write_text(json.dumps(record))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(run)))
    told = f"Beta has collapsed: 100.0 after 01_Alpha, {now:.1f} after 02_Beta"
    said = command_in_child("run", tmp_path / "run.yaml", "eval.collapse_alarm=40")
    assert said.code == 0, said.err
    assert f"WARNING ALARM in stage 02_Beta/evaluate: {told}" in (run / "log.txt").read_text()
    assert json.loads((run / "results.json").read_text())["alarms"] == [told]
    assert told in (run / "report.html").read_text()
    assert "alarms" not in json.loads((two / "results.json").read_text())


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["check", "CONFIG"], "mllm_keeplora.checks.run:check_run"),
        (["eval", "RUN"], "mllm_keeplora.eval.harness:Journal.add"),
        (["ask", "RUN", "what ?"], "mllm_keeplora.eval.asking:generate"),
        (["export", "RUN", "DIR"], "mllm_keeplora.exports.checkpoint:merge_for_good"),
    ],
)
def test_ctrl_c_ends_every_command_with_130_and_without_a_traceback(words, place, settings, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "new")))
    named = {"CONFIG": tmp_path / "run.yaml", "RUN": run, "DIR": tmp_path / "out"}
    said = command_in_child(*(named.get(word, word) for word in words), kill=(place, 1), act=interrupted)
    assert said.code == 130 and "Traceback" not in said.err and said.err.rstrip().splitlines()[-1].startswith("stopped")
    assert not (tmp_path / "out").exists() and stages(run) == stages(two)
