"""Records without pictures: whole domains of them, and domains where some have one and some do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.strategies import STRATEGIES
from mllm_keeplora.system import files
from tests.integration.conftest import TRAIN, strategy_of
from tests.integration.processes import run_in_child, run_on_two
from tests.integration.test_two_processes import logits
from tests.support.tiny import tiny_benchmark


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> Path:
    """That of the tiny world, but no training record of Alpha has a picture, and one in four of Beta."""
    root = tmp_path_factory.mktemp("pictureless") / "data"
    shutil.copytree(world / "data", root)
    for name, every in (("Alpha", TRAIN + 1), ("Beta", 4)):
        path = root / name / "train.json"
        rows = json.loads(path.read_text())
        for index, row in enumerate(rows):
            if (index + 1) % every:
                del row["image"]
                row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix("<image>\n")
        path.write_text(json.dumps(rows))
    return root


def projectors_in(factors: Path) -> bool:
    return any("projector" in name for name in files.read_tensors(factors / "adapter_model.safetensors"))


FAST = ("keeplora",)


@pytest.mark.parametrize(
    "strategy", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in STRATEGIES]
)
def test_every_strategy_learns_a_domain_of_text_alone(settings, data, tmp_path, strategy):
    values = settings(tmp_path / "run", benchmark=tiny_benchmark(data), eval={"limit": 2}, diagnostics={"samples": 8})
    values["strategy"] = strategy_of(strategy)
    if strategy == "keeplora":
        values["strategy"]["on_exhaustion"] = "error"  # a projector that no gradient reaches is not exhausted
    assert run_in_child(values) == 0
    _, *folders = sorted((tmp_path / "run" / "domains").iterdir())
    if strategy == "keeplora":
        assert [projectors_in(folder / "adapter") for folder in folders] == [False, True]
        looked_at = files.read_json(folders[0] / "diagnostics.json")["inputs"]
        assert not any("projector" in layer for layer in looked_at["Alpha"])
        assert any("projector" in layer for layer in looked_at["general"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "zero1", "zero2"])
@pytest.mark.parametrize("strategy", ["dac", "finetune", "keeplora", "replay"])
def test_processes_without_a_picture_keep_step_with_those_that_have_one(settings, data, tmp_path, strategy, engine):
    """Also in micro-batches of one record, most of which reach no projector, but for a picture that is replayed."""
    given = strategy_of(strategy) | ({"router_grad": "straight_through"} if strategy == "dac" else {})
    order = ("Beta", "Alpha") if strategy == "replay" else ("Alpha", "Beta")
    runs = [tmp_path / name for name in ("one", "two")]
    changes = {"benchmark": tiny_benchmark(data), "eval": {"limit": 2, "zero_shot": False}}
    one, two = ({**settings(run, order, **changes), "strategy": given} for run in runs)
    two |= {"deepspeed": engine, "train": {**two["train"], "micro_batch_size": 1}}
    assert run_in_child(one) == 0
    assert [(end.code, end.err[-4000:] if end.code else "") for end in run_on_two(two, tmp_path)] == [(0, "")] * 2
    one, two = map(load_run, runs)
    found, wanted, before = (logits(saved, strategy, after) for saved, after in ((two, 2), (one, 2), (one, 0)))
    assert (found - wanted).norm() < 1e-3 * (wanted - before).norm()


@pytest.mark.slow
def test_a_domain_of_text_alone_is_learnt_under_zero3(settings, data, tmp_path):
    values = settings(tmp_path / "run", ("Alpha", "Gamma"), benchmark=tiny_benchmark(data), eval={"limit": 2})
    ends = run_on_two({**values, "deepspeed": "zero3"}, tmp_path)
    assert [(end.code, end.err[-4000:] if end.code else "") for end in ends] == [(0, "")] * 2
