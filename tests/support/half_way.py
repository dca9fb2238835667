"""Makes tests/fixtures/half_way: a run that an older version left half-way, with its base and its data.

The fixture was made by commit d864ca9 (`python -m tests.support.half_way FOLDER` in a checkout of it, with this file
added): KeepLoRA over Alpha and Beta, killed in Beta's training. Its checkpoints hold pickles of the Trainer and are left
out, but for what they say of whose they are; `expected` is what the same run ends with if nothing kills it. ROOT stands
for the folder that it was made in.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.integration.processes import run_in_child
from tests.support.tiny import tiny_benchmark, tiny_config, write_tiny_data, write_tiny_llava

ROOT = "/half_way_root"
TRAIN = 12


def half_way_config() -> dict:
    """The run's config; paths are relative to the fixture's folder."""
    changes = {
        "strategy": {"grad_samples": TRAIN, "feature_samples": TRAIN},
        "train": {"lr": 3e-2, "epochs": 2},
        "eval": {"batch_size": 4},
        "benchmark": tiny_benchmark(Path("data"), ("Alpha", "Beta")),
    }
    return tiny_config(Path("base"), Path("data"), Path("run"), domains=["Alpha", "Beta"], **changes)


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_tiny_llava(Path("base"))
    write_tiny_data(Path("data"), train=TRAIN, test=8, domains=("Alpha", "Beta"))
    code = run_in_child(half_way_config(), kill=("mllm_keeplora.training.fit:Reporter.on_step_end", 11))
    assert code == -9, code
    expected = Path("expected")
    expected.mkdir()
    checkpoints = Path("run/domains/02_Beta/checkpoints")
    shutil.copy(checkpoints / "checkpoint-4/complete.json", expected)
    shutil.rmtree(checkpoints)
    assert run_in_child({**half_way_config(), "output": "whole"}) == 0
    for name in (
        "results.json",
        "domains/02_Beta/basis.safetensors",
        "domains/02_Beta/adapter/adapter_model.safetensors",
    ):
        shutil.copy(Path("whole") / name, expected)
    shutil.copytree("whole/domains/02_Beta/predictions", expected / "predictions")
    shutil.rmtree("whole")
    for path in [*Path().rglob(".lock"), *Path().rglob("log.txt")]:
        path.unlink()
    for path in (Path("run/run.json"), Path("run/config.yaml")):
        path.write_text(path.read_text().replace(str(folder.resolve()), ROOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
