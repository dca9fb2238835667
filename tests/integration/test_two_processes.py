"""Sums over two real processes (gloo): what is summed is the tensor, whatever its strides."""

from __future__ import annotations

import json
import shutil

from tests.integration.processes import launched
from tests.support.tiny import tiny_benchmark

CHILD = """
import json, sys, torch
from mllm_keeplora import distributed
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
from mllm_keeplora import distributed
from mllm_keeplora.check import check_everywhere
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
