"""Sums over two real processes (gloo): what is summed is the tensor, whatever its strides."""

from __future__ import annotations

import json
import subprocess
import sys

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
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, timeout=120, capture_output=True)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
