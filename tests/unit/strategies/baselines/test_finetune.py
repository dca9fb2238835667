"""Sequential LoRA, which every comparison leans on, against peft and a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from tests.support.strategies import context_of, fit, open_branch
from tests.unit.adapters.conftest import adapt
from tests.unit.conftest import encode

RANK, ALPHA, STEPS, LR = 4, 8.0, 3, 1e-2


@pytest.fixture
def opened(new_base, tiny_records):
    """The context of a first domain whose branch is open."""
    base = new_base()
    context = context_of(base, adapt(base), tiny_records, 0)
    open_branch(Finetune(FinetuneOptions(rank=RANK, alpha=ALPHA)), context)
    return context


def stock(base):
    """The same layers as peft adapts them by itself."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(base.parts.target_layers))
    return get_peft_model(base.model, config)


def layers_of(model, names):
    return {name: model.get_submodule(f"base_model.model.{name}") for name in names}


def test_a_domain_is_stock_lora_trained_by_a_plain_loop(opened, new_base, tiny_records, tmp_path):
    """Every step takes all records, so that their order does not matter; AdamW without decay."""
    start, records = opened.branches.read(), tiny_records["Alpha"]
    plain = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "batch_size": len(records)}
    facts = fit(Finetune(FinetuneOptions()), opened, tmp_path, lr=LR, epochs=float(STEPS), **plain)
    assert facts["steps"] == STEPS

    base = new_base()
    model, batch = stock(base), encode(base, records)
    layers = layers_of(model, start.A)
    for name, layer in layers.items():
        assert layer.scaling["default"] == start.scaling(name) == ALPHA / RANK
        layer.lora_A["default"].weight.data.copy_(start.A[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    model.eval()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    found = opened.branches.read()
    for name, layer in layers.items():
        for own, theirs in ((found.A, layer.lora_A), (found.B, layer.lora_B)):
            assert torch.allclose(own[name], theirs["default"].weight, atol=2e-5), name
        assert found.B[name].abs().max() > LR


def test_a_branch_begins_as_peft_begins_it(opened, new_base):
    """A uniform within 1 / sqrt(d_in), whose square has a third of that in the mean; B zero."""
    start, layers = opened.branches.read(), layers_of(stock(new_base()), opened.layers.names)
    for drawn in (start.A, {name: layer.lora_A["default"].weight.detach() for name, layer in layers.items()}):
        scaled = torch.cat([(A * math.sqrt(A.shape[1])).flatten() for A in drawn.values()])
        assert 0.99 < scaled.abs().max() <= 1.0 and scaled.min() < -0.99
        assert scaled.square().mean().item() == pytest.approx(1 / 3, abs=0.02) and scaled.mean().abs() < 0.03
    assert not any(B.any() for B in start.B.values())
