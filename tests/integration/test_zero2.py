"""Two CPU processes under DeepSpeed ZeRO-2 finish a short sequence and agree with a single process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.processes import leftovers, results, stages

UNITS = ("01_Alpha", "02_Beta")


@pytest.fixture(scope="module")
def zero2(settings, tmp_path_factory) -> Path:
    """The run of the fixture `two`, by two processes: the same global batch, half of it each."""
    folder = tmp_path_factory.mktemp("zero2")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder / "run")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    words = [*launch, "-m", "mllm_keeplora", "run", str(folder / "run.yaml"), "deepspeed=zero2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("strategy keeplora") == 1, "the main process alone prints"
    return folder / "run"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_stage_is_done_once_and_nothing_unfinished_is_left(zero2, two):
    assert stages(zero2) == stages(two)
    assert leftovers(zero2) == []


def test_ranks_of_branches_and_kept_bases_are_those_of_one_process(zero2, two):
    def shapes(run: Path, name: str) -> dict:
        from safetensors.torch import load_file

        return {key: tuple(tensor.shape) for key, tensor in load_file(run / name).items()}

    files = ["prepare/basis", *(f"domains/{unit}/{part}" for unit in UNITS for part in ("init", "basis"))]
    assert len(files) == 5
    for name in files:
        one, both = (shapes(run, f"{name}.safetensors") for run in (two, zero2))
        assert one and one == both


def test_losses_are_those_of_one_process_at_the_same_global_batch(zero2, two):
    def losses(run: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert len(losses(two)) == 12
    assert losses(zero2) == pytest.approx(losses(two), rel=1e-3)


def test_most_answers_are_those_of_one_process(zero2, two):
    def answers(run: Path) -> list[str]:
        paths = sorted((run / "domains").glob("*/predictions/*.jsonl"))
        return [json.loads(line)["prediction"] for path in paths for line in path.read_text().splitlines()]

    one, both = answers(two), answers(zero2)
    assert len(one) == len(both) == 9 * 8
    assert sum(a == b for a, b in zip(one, both, strict=True)) >= 0.9 * len(one)
    assert results(zero2)["domains"] == results(two)["domains"]
