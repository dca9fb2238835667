"""Two CPU processes under every ZeRO stage finish a short sequence and agree with a single one; killed, they resume.

Four processes do, too, with records that four do not divide.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mllm_keeplora.system.files import read_tensors
from tests.integration.conftest import strategy_of
from tests.integration.processes import (
    differing,
    free_port,
    killed,
    leftovers,
    results,
    run_in_child,
    run_on_two,
    stages,
)
from tests.support.tiny import tiny_benchmark, write_tiny_data

UNITS = ("01_Alpha", "02_Beta")
STEPS = 6  # optimizer steps of a domain
ENGINES = {
    "zero1": "auto",
    "zero2": "auto",
    "zero3": "divided",
    "zero3_offload": "gathered",
}
FAST = [pytest.param(name, marks=[] if name == "zero3" else pytest.mark.slow) for name in ENGINES]


@pytest.fixture(scope="module", params=FAST)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def zero(engine, settings, tmp_path_factory) -> Path:
    """The run of the fixture `two`, by two processes: the same global batch, half of it each."""
    folder = tmp_path_factory.mktemp(engine)
    finish(config_of(engine, settings, folder / "run"), folder)
    return folder / "run"


def config_of(engine: str, settings, output: Path) -> dict:
    values = settings(output, deepspeed=engine, train={"checkpoint_steps": 2})
    return {**values, "eval": {**values["eval"], "weights": ENGINES[engine]}}


def finish(values: dict, folder: Path) -> None:
    assert [(end.code, end.err[-4000:] if end.code else "") for end in run_on_two(values, folder)] == [(0, "")] * 2


def spans(run: Path, name: str) -> dict[str, torch.Tensor]:
    stored = read_tensors(run / name)
    return {key: tensor.mT if name.endswith("init.safetensors") else tensor for key, tensor in stored.items()}


def assert_same_spans(first: Path, second: Path) -> None:
    """Kept bases and A of every domain, to a projector difference of 1e-3."""
    for name in ["prepare/basis", *(f"domains/{unit}/{part}" for unit in UNITS for part in ("init", "basis"))]:
        one, other = (spans(run, f"{name}.safetensors") for run in (first, second))
        assert one.keys() == other.keys() and one
        for layer, columns in one.items():
            assert columns.shape == other[layer].shape
            assert (columns @ columns.mT - other[layer] @ other[layer].mT).norm() < 1e-3, (name, layer)


def losses(run: Path) -> dict[tuple[int, int], float]:
    """By domain and step; a step that was repeated after a stop counts as it was last."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["domain_index"], row["optimizer_step"]): row["loss"] for row in rows}


def answers(run: Path) -> list[str]:
    paths = sorted((run / "domains").glob("*/predictions/*.jsonl"))
    return [json.loads(line)["prediction"] for path in paths for line in path.read_text().splitlines()]


def assert_agree(first: Path, second: Path, questions: int) -> None:
    assert_same_spans(first, second)
    assert len(losses(first)) == 2 * STEPS
    assert losses(second) == pytest.approx(losses(first), rel=1e-3)
    one, other = answers(first), answers(second)
    assert len(one) == len(other) == questions
    assert sum(a == b for a, b in zip(one, other, strict=True)) >= 0.99 * len(one)


def test_a_sequence_agrees_with_that_of_one_process_at_the_same_global_batch(zero, two):
    assert stages(zero) == stages(two)
    assert leftovers(zero) == []
    assert_agree(two, zero, questions=9 * 8)
    assert results(zero)["domains"] == results(two)["domains"]


@pytest.mark.slow
def test_a_run_killed_inside_a_training_ends_as_one_that_was_not(engine, zero, settings, tmp_path):
    """The process that is killed has saved two checkpoints; the tolerance is that of one process against two."""
    values = config_of(engine, settings, tmp_path / "run")
    acts = {1: ("mllm_keeplora.training.fit:Reporter.on_step_end", STEPS + 5, killed)}
    ends = run_on_two(values, tmp_path / "first", acts)
    assert ends[1].code < 0 and ends[0].code == 1
    assert (tmp_path / "run/domains/02_Beta/checkpoints/checkpoint-4/complete.json").is_file()
    finish(values, tmp_path / "again")
    assert stages(tmp_path / "run") == stages(zero)
    assert leftovers(tmp_path / "run") == []
    assert_agree(zero, tmp_path / "run", questions=9 * 8)


@pytest.mark.slow
@pytest.mark.parametrize(("ran_under", "goes_on_under"), [("zero2", None), (None, "zero2"), ("zero2", "zero2")])
def test_a_run_goes_on_under_another_engine_or_in_fewer_processes(ran_under, goes_on_under, two, settings, tmp_path):
    """DeepSpeed's optimizer state is read by itself in as many processes alone: else a domain begins anew."""
    acts = {rank: ("mllm_keeplora.training.fit:Reporter.on_step_end", STEPS + 5, killed) for rank in (0, 1)}
    run_on_two({**config_of("zero2", settings, tmp_path / "run"), "deepspeed": ran_under}, tmp_path / "first", acts)
    assert (tmp_path / "run/domains/02_Beta/checkpoints/checkpoint-4/complete.json").is_file()
    assert run_in_child(settings(tmp_path / "run", deepspeed=goes_on_under)) == 0
    assert leftovers(tmp_path / "run") == []
    assert_agree(two, tmp_path / "run", questions=9 * 8)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["keeplora", "gpm", "gainlora"])
def test_what_is_stored_of_a_training_in_half_precision_is_what_was_trained(strategy, settings, tmp_path):
    """The engine's float32 values, not the rounded ones that ran; killed behind the training, the rest is the same."""
    values = settings(tmp_path / "run", deepspeed="zero2")
    values["base"]["dtype"], values["strategy"] = "bfloat16", strategy_of(strategy)
    assert run_in_child(values) == 0
    learnt = read_tensors(tmp_path / "run/domains/02_Beta/adapter/adapter_model.safetensors")
    B = torch.cat([tensor.flatten() for name, tensor in learnt.items() if "lora_B" in name])
    assert B.dtype == torch.float32 and (B.bfloat16().float() != B).float().mean() > 0.9
    if strategy == "gpm":
        kept = read_tensors(tmp_path / "run/domains/01_Alpha/basis.safetensors")
        for layer, columns in kept.items():
            A = learnt[f"base_model.model.{layer}.lora_A.weight"]
            assert (A @ columns).norm() < 1e-5 * A.norm(), layer
    if strategy == "gainlora":
        gates, later = (
            read_tensors(tmp_path / f"run/domains/{unit}/mixer.safetensors") for unit in ("01_Alpha", "02_Beta")
        )
        assert len(gates) == 3 and all(torch.equal(gate, later[name]) for name, gate in gates.items())
        assert all((gate.bfloat16().float() != gate).float().mean() > 0.9 for gate in gates.values())
    again = {**values, "output": str(tmp_path / "again")}
    assert run_in_child(again, kill=("mllm_keeplora.sequence:consolidate", 2)) < 0
    assert run_in_child(again) == 0
    assert differing(tmp_path / "run", tmp_path / "again") == []


@pytest.mark.slow
@pytest.mark.parametrize("engine_of_four", [None, "zero2", "zero3"])
def test_four_processes_share_records_that_they_do_not_divide(engine_of_four, settings, tmp_path):
    data = write_tiny_data(tmp_path / "data", train=10, test=7)
    changes = {"benchmark": tiny_benchmark(data), "train": {"batch_size": 4}, "strategy": {"grad_samples": 9}}
    one, four = (settings(tmp_path / name, **changes) for name in ("one", "four"))
    assert run_in_child(one) == 0
    (tmp_path / "four.yaml").write_text(yaml.safe_dump({**four, "deepspeed": engine_of_four}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = [*launch, "-m", "mllm_keeplora", "run", str(tmp_path / "four.yaml")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("strategy keeplora") == 1, "the main process alone prints"
    assert_same_spans(tmp_path / "one", tmp_path / "four")
    assert len(answers(tmp_path / "four")) == len(answers(tmp_path / "one"))
