"""The seam of kinds of base is one: a toy family learns and answers, and nothing above `models` has heard of it."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_keeplora.adapters.stored import kept_of
from mllm_keeplora.checks.run import Checked
from mllm_keeplora.config import parse_config
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.runs import BASE_UNIT
from mllm_keeplora.stages.consolidate import consolidate
from mllm_keeplora.stages.diagnose import diagnose
from mllm_keeplora.stages.evaluate import evaluate
from mllm_keeplora.stages.gradient import gradient
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.stages.opening import open_run
from mllm_keeplora.stages.prepare import prepare
from mllm_keeplora.stages.train import train
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.system import files
from tests.support.tiny import COLOURS, PLACES, tiny_benchmark, tiny_config, write_tiny_data
from tests.support.toy_family import toy_base

OPTIONS = {
    "keeplora": {"grad_samples": 24, "feature_samples": 24, "energy_weights": 0.3, "energy_features": 0.5},
    "inflora": {"feature_samples": 24, "energy": 0.5, "energy_end": 0.6},
    "ewc": {"samples": 8},
    "replay": {"buffer": 8},
    "agem": {"buffer": 8},
    "ortho_lora": {"buffer": 8},
    "lwf": {},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("toy_data"), train=24, test=8, domains=("Alpha", "Beta"))


@pytest.fixture(scope="module", params=OPTIONS)
def learnt(request, data, tmp_path_factory):
    """A learner that has been through both domains, and the losses before and after the first training."""
    values = tiny_config("toy", data, tmp_path_factory.mktemp("toy") / "run", domains=["Alpha", "Beta"])
    values["benchmark"] = tiny_benchmark(data, ("Alpha", "Beta"), suite=False)
    values["train"] |= {"lr": 5e-2, "epochs": 8, "batch_size": 8, "checkpoint_steps": 100}
    values["strategy"] = {"name": request.param, "rank": 4, "alpha": 8, **OPTIONS[request.param]}
    config = parse_config(values, "test")
    strategy, benchmark = build_strategy(config.strategy), load_benchmark(config)
    run = open_run(config, Checked(strategy, benchmark, "toy", "toy0"))
    learner = Learner(config, run, benchmark, strategy)
    learner.base = toy_base((*COLOURS, *PLACES))
    run.once("prepare", lambda: prepare(learner))
    evaluate(learner, BASE_UNIT)
    for unit in run.units:
        for stage in (gradient, train, consolidate, diagnose):
            run.once(f"{unit.key}/{stage.__name__}", lambda stage=stage, unit=unit: stage(learner, unit))
        evaluate(learner, unit)
    return learner


def test_a_second_family_learns_and_answers(learnt):
    run = learnt.run
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    first = [row["loss"] for row in rows if row["domain_index"] == 0]
    assert sum(first[-3:]) < 0.8 * sum(first[:3])
    for unit in run.units:
        for name in ("Alpha", "Beta"):
            answers = files.read_json_lines(run.folder(unit).predictions(name))
            assert len(answers) == 8 and {row["prediction"] for row in answers} <= {*COLOURS, *PLACES}
    scores = {stage: entry["score"] for stage, entry in run.ledger.stages.items() if "score" in entry}
    assert len(scores) == 6 and scores["01_Alpha/evaluate/Alpha"] > scores["00_base/evaluate/Alpha"]
    told = files.read_json(run.folder(run.units[1]).diagnostics)
    assert set(told["inputs"]["Alpha"]) == {"see", "read"}


def test_what_a_subspace_method_keeps_is_kept(learnt):
    if learnt.config.strategy.name not in ("keeplora", "inflora"):
        return
    run = learnt.run
    before = kept_of(run, run.units[:1])
    factors = files.read_tensors(run.folder(run.units[1]).init)
    for layer, basis in before.items():
        assert 0 < basis.rank < basis.d_in
        A = next(tensor for name, tensor in factors.items() if layer in name and tensor.shape[-1] == basis.d_in)
        assert torch.linalg.matrix_norm(A.float() @ basis.columns) < 1e-4 * torch.linalg.matrix_norm(A.float())
