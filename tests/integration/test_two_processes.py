"""Two real processes (gloo) do what one does: sums, checks, and every strategy's sequence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.adapters.mixers.mixing import look_at
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.strategies import STRATEGIES
from tests.integration.conftest import strategy_of
from tests.integration.processes import launched, run_in_child, run_on_two
from tests.support.tiny import tiny_benchmark

CHILD = """
import json, sys, torch
from mllm_keeplora.system import distributed
with distributed.process_group(deepspeed=False):
    rank = distributed.rank()
    values = torch.arange(6.0).view(2, 3)
    strided = values.mT.contiguous().mT if rank == 0 else torch.zeros(2, 3)  # column-major on one process only
    distributed.all_reduce([strided])
    with open(f"{sys.argv[1]}/{rank}.json", "w") as handle:
        json.dump(strided.tolist(), handle)
"""


def test_a_strided_tensor_is_summed_by_its_entries(tmp_path):
    launched(CHILD, tmp_path, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


CHECKING = """
import json, sys
from mllm_keeplora.system import distributed
from mllm_keeplora.checks.run import check_everywhere
from mllm_keeplora.config import parse_config
from mllm_keeplora.errors import UserError
with distributed.process_group(deepspeed=False):
    try:
        check_everywhere(parse_config(json.load(open(f"{sys.argv[1]}/config.json")), "test"))
        told = []
    except UserError as error:
        told = list(error.sentences)
    with open(f"{sys.argv[1]}/{distributed.rank()}.json", "w") as handle:
        json.dump(told, handle)
"""


@pytest.mark.slow
def test_each_process_looks_into_its_share_and_all_tell_every_fault(settings, world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    broken = [data / "Alpha" / "images" / f"train_{number}.png" for number in (2, 5)]  # one of each process's share
    for path in broken:
        path.unlink()
    config = settings(tmp_path / "out", benchmark=tiny_benchmark(data))
    (tmp_path / "config.json").write_text(json.dumps(config))
    launched(CHECKING, tmp_path, tmp_path)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(told) == 2 and all(any(path.name in each for each in told) for path in broken), told


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_learns_the_same_in_two_processes_and_in_micro_batches(settings, tmp_path, strategy):
    """The same records in every global batch, a quarter of them at a time: the same model but for the order of sums."""
    runs, given = [tmp_path / name for name in ("one", "two")], strategy_of(strategy)
    one, two = ({**settings(run, eval={"limit": 2, "zero_shot": False}), "strategy": given} for run in runs)
    two["train"] = {**two["train"], "micro_batch_size": 1}
    assert run_in_child(one) == 0
    assert [(end.code, end.err[-4000:] if end.code else "") for end in run_on_two(two, tmp_path)] == [(0, "")] * 2
    one, two = map(load_run, runs)
    found, wanted = (logits(saved, strategy, len(saved.run.finished_units)) for saved in (two, one))
    before = logits(one, strategy, after=0)
    assert (found - wanted).norm() < 1e-3 * (wanted - before).norm()


def test_a_mean_of_micro_batches_is_the_same_in_two_processes_of_which_one_has_none_left(settings, tmp_path):
    """Twelve records in steps of eight, four at a time: the last step of an epoch leaves nothing to one process."""
    train = {"batch_size": 8, "micro_batch_size": 4, "loss_mean": "micro_batches"}
    runs, short = [tmp_path / name for name in ("one", "two")], {"eval": {"limit": 2, "zero_shot": False}}
    one, two = (
        {**settings(run, ("Alpha",), train=train, **short), "strategy": strategy_of("finetune")} for run in runs
    )
    assert run_in_child(one) == 0
    assert [(end.code, end.err[-4000:] if end.code else "") for end in run_on_two(two, tmp_path)] == [(0, "")] * 2
    found, wanted = (Factors.load(run / "domains/01_Alpha/adapter") for run in runs)
    for layer, B in wanted.B.items():
        assert torch.allclose(found.B[layer], B, atol=1e-4), layer
        assert B.abs().max() > 1e-3


def logits(saved, strategy: str, after: int) -> torch.Tensor:
    domain = "Beta" if STRATEGIES[strategy].needs_domain_id and after else None
    records = [saved.benchmark.train_records("Beta")[index].first_exchange() for index in range(4)]
    batch, model = saved.base.family.training_batch(records), saved.restore(after, domain)
    look_at(saved.base.model, batch)
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits
