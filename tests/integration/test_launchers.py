"""The same command line under the launchers of accelerate and DeepSpeed (torchrun's is in `test_scripts`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.processes import free_port, results

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "accelerate": ["launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no", "--main_process_port", "PORT", "-m"],
    "deepspeed": ["--num_accelerators", "2", "--master_port", "PORT", "--module"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sequence_runs_under_another_launcher(launcher, settings, two, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run")))
    words = [str(free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
    command = [str(BIN / launcher), *words, "mllm_keeplora", "run", str(tmp_path / "run.yaml"), "deepspeed=zero2"]
    paths = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert results(tmp_path / "run")["domains"] == results(two)["domains"]
