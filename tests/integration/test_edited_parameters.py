"""A strategy's edit of a parameter outside the optimizer holds: the next step starts from it, on every process."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_keeplora.system.files import read_tensors
from tests.integration.processes import launched

CHILD = """
import json, sys, torch
from mllm_keeplora.config import parse_config
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.strategies.baselines.finetune import Finetune

def around_step(self, context, phase, step):
    if phase == "post" and step.number == 0:
        for name in context.branches.trainable():
            context.edit_parameter(name, lambda tensor: torch.full_like(tensor, 5.0))

Finetune.around_step = around_step
run_sequence(parse_config(json.load(open(sys.argv[1])), "test"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "zero2", "zero3"])
def test_an_edit_after_the_first_step_is_what_later_steps_start_from(engine, settings, tmp_path):
    """Six steps at a rate that moves nothing: without the optimizer's own copy the old values would come back."""
    values = settings(tmp_path / "run", domains=("Alpha",), deepspeed=engine, train={"lr": 1e-6})
    values |= {"strategy": {"name": "finetune", "rank": 4, "alpha": 8}, "eval": {"zero_shot": False, "limit": 2}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    launched(CHILD, tmp_path, tmp_path / "config.json")
    stored = read_tensors(tmp_path / "run/domains/01_Alpha/adapter/adapter_model.safetensors")
    assert stored
    for name, tensor in stored.items():
        assert torch.allclose(tensor, torch.full_like(tensor, 5.0), atol=1e-3), name
