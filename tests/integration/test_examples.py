"""What `examples/` shows works, and KeepLoRA by hand learns what a run learns."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.adapters.stored import kept_of
from mllm_keeplora.runs import RunDir
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.system import files
from tests.integration.processes import command_in_child, results, run_in_child
from tests.support.tiny import tiny_benchmark

EXAMPLES = Path(__file__).parents[2] / "examples"
SAME = 1e-4  # relative: both are float32, and sum in different orders


@pytest.fixture(scope="module")
def by_hand(world):
    """What the script's names stand for at its end, and what it said."""
    settings = {"rank": 4, "alpha": 8, "samples": 8, "lr": 3e-2, "epochs": 2, "batch": 4, "warmup": 0.03}
    options = [f"--{name}={value}" for name, value in {**settings, "answer_tokens": 3}.items()]
    words = [EXAMPLES / "keeplora_by_hand.py", world / "base", world / "data/Alpha", world / "data/Beta", *options]
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, words)))
        patch.setattr("builtins.print", said.append)
        return runpy.run_path(str(words[0])), said


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> RunDir:
    output = tmp_path_factory.mktemp("by_hand") / "run"
    values = settings(output, strategy={"grad_samples": 8, "feature_samples": 8})
    assert run_in_child(values) == 0
    return RunDir(output).load()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def test_by_hand_the_same_directions_are_kept(by_hand, run):
    kept = kept_of(run, run.units)
    assert kept.keys() == by_hand[0]["kept"].keys() and len(kept) == 16
    for layer, basis in kept.items():
        own = by_hand[0]["kept"][layer].columns
        assert own.shape == basis.columns.shape
        assert relative(own @ own.mT, basis.columns @ basis.columns.mT) < SAME, layer


@pytest.mark.parametrize("number", [0, 1])
def test_by_hand_the_same_is_learnt(number, by_hand, run):
    A, B = by_hand[0]["learnt"][number]
    factors = Factors.load(run.folder(run.units[number]).adapter)
    assert {layer for layer, rows in A.items() if len(rows)} == factors.A.keys() and len(factors.A) >= 14
    for layer in factors.A:
        assert relative(A[layer], factors.A[layer]) < SAME, layer
        assert relative(2.0 * B[layer].detach() @ A[layer], factors.delta(layer)) < SAME, layer
        assert factors.delta(layer).norm() > 1e-2


def test_by_hand_the_same_is_answered(by_hand, run):
    scores = [float(re.search(r": ([\d.]+) %", line)[1]) for line in by_hand[1]]
    (alpha, _), (again, beta) = results(run.path)["score_matrix"]
    assert scores == pytest.approx([alpha, again, beta], abs=0.05)


def test_own_method_runs_by_its_name(world, tmp_path, monkeypatch):
    folder = EXAMPLES / "own_method"
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    shorter = [
        f"base.model={world / 'base'}", f"benchmark={json.dumps(tiny_benchmark(world / 'data'))}",
        "domains=[Alpha, Beta]", "strategy.rank=4", "train.batch_size=4", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    said = command_in_child("run", folder / "run.yaml", *shorter)
    assert said.code == 0, said.err
    assert results(tmp_path / "run")["settings"]["strategy.pull"] == 0.1
    record = files.read_json(tmp_path / "run/run.json")
    assert record["plugins"].keys() == {"own_method"} and "02_Beta/consolidate" in record["stages"]


def test_own_method_pulls_back_to_the_start(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "own_method")
    from own_method import Pulled, PulledOptions

    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    context = SimpleNamespace(branches=SimpleNamespace(trainable=lambda: {"theta": theta}))
    strategy = Pulled(PulledOptions(pull=3.0))
    strategy.load_training_state({})
    assert strategy.extra_loss(context, {}, None, Step(0, 4)).item() == 0.0
    with torch.no_grad():
        theta += torch.tensor([1.0, -2.0])
    continued = Pulled(PulledOptions(pull=3.0))
    continued.load_training_state(strategy.training_state())
    continued.extra_loss(context, {}, None, Step(0, 4)).backward()
    assert theta.grad.tolist() == [3.0, -6.0]
