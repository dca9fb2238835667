"""Two CPU processes under every ZeRO stage finish a short sequence and agree with a single process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mllm_keeplora.files import read_tensors
from tests.integration.processes import leftovers, results, stages

UNITS = ("01_Alpha", "02_Beta")
ENGINES = {
    "zero1": [],
    "zero2": [],
    "zero3": ["eval.weights=divided"],
    "zero3_offload": ["eval.weights=gathered"],
}


def launch(words: list[str], processes: int) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    start += ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, "-m", "mllm_keeplora", *words], env=environment, capture_output=True, text=True, timeout=500
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=ENGINES)
def zero(request, settings, tmp_path_factory) -> Path:
    """The run of the fixture `two`, by two processes: the same global batch, half of it each."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder / "run")))
    words = ["run", str(folder / "run.yaml"), f"deepspeed={request.param}", *ENGINES[request.param]]
    done = launch(words, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("strategy keeplora") == 1, "the main process alone prints"
    return folder / "run"


def test_every_stage_is_done_once_and_nothing_unfinished_is_left(zero, two):
    assert stages(zero) == stages(two)
    assert leftovers(zero) == []


def test_kept_bases_and_starts_span_what_those_of_one_process_do(zero, two):
    def spans(run: Path, name: str) -> dict[str, torch.Tensor]:
        stored = read_tensors(run / name)
        return {key: tensor.mT if name.endswith("init.safetensors") else tensor for key, tensor in stored.items()}

    files = ["prepare/basis", *(f"domains/{unit}/{part}" for unit in UNITS for part in ("init", "basis"))]
    for name in files:
        one, both = (spans(run, f"{name}.safetensors") for run in (two, zero))
        assert one.keys() == both.keys() and one
        for layer, columns in one.items():
            assert columns.shape == both[layer].shape
            assert (columns @ columns.mT - both[layer] @ both[layer].mT).norm() < 1e-3, (name, layer)


def test_losses_are_those_of_one_process_at_the_same_global_batch(zero, two):
    def losses(run: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert len(losses(two)) == 12
    assert losses(zero) == pytest.approx(losses(two), rel=1e-3)


def test_answers_are_those_of_one_process(zero, two):
    def answers(run: Path) -> list[str]:
        paths = sorted((run / "domains").glob("*/predictions/*.jsonl"))
        return [json.loads(line)["prediction"] for path in paths for line in path.read_text().splitlines()]

    one, both = answers(two), answers(zero)
    assert len(one) == len(both) == 9 * 8
    assert sum(a == b for a, b in zip(one, both, strict=True)) >= 0.99 * len(one)
    assert results(zero)["domains"] == results(two)["domains"]
