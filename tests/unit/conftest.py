"""Tiny random models and data, made once; and plain ways to look into a model, written apart from the library's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny LLaVA of two language layers, as transformers saves it."""
    import torch

    from tests.support.tiny import write_tiny_llava

    torch.set_num_threads(1)
    return write_tiny_llava(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory) -> dict[str, list]:
    """Twelve training records of one or two question-answer pairs (in turn) for each of two domains."""
    from mllm_keeplora.data.readers import read_train
    from tests.support.tiny import write_tiny_data

    root = write_tiny_data(tmp_path_factory.mktemp("tiny_data"), train=12, test=1, domains=("Alpha", "Beta"))
    return {name: read_train(root / name / "train.json", root / name) for name in ("Alpha", "Beta")}


@pytest.fixture(scope="session")
def new_base(tiny_folder) -> Callable:
    """Function (projector="keeplora", dtype="float32") -> the same base model each time, with weights of its own."""
    from mllm_keeplora.config import BaseConfig
    from mllm_keeplora.models import load_base

    loaded = {}

    def fresh(projector: str = "keeplora", dtype: str = "float32"):
        key = projector, dtype
        if key not in loaded:
            loaded[key] = load_base(BaseConfig(model=str(tiny_folder), dtype=dtype), projector)
        return dataclasses.replace(loaded[key], model=copy.deepcopy(loaded[key].model))

    return fresh


@pytest.fixture
def base(new_base):
    return new_base()


@pytest.fixture(scope="session", params=["merged", "factors"])
def taught(request, new_base, tiny_records, tmp_path_factory):
    """Two domains taught with KeepLoRA, once per history; tests only look at it."""
    from tests.support.keeplora import teach

    return teach(new_base(), request.param, tiny_records, tmp_path_factory.mktemp(request.param))


def encode(base, records) -> dict:
    """Model inputs with labels for records."""

    return base.family.training_batch(records)


def logits_of(model, batch: dict):
    """Logits (b, t, vocabulary) in evaluation mode, dropout off."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def captured_tokens(model, modules: dict, samples: list[dict]) -> dict:
    """Inputs (n, d_in), float64 numpy, of each module over samples that are run one by one, hence without padding."""
    import numpy as np

    rows: dict[str, list] = {name: [] for name in modules}

    def keep(name):
        return lambda module, args: rows[name].append(args[0].reshape(-1, args[0].shape[-1]).double().numpy().copy())

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    for sample in samples:
        assert bool(sample["attention_mask"].all())
        logits_of(model, sample)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def autograd_mean_gradients(model, weights: dict, samples: list[dict]) -> dict:
    """Mean over samples, run one by one, of plain autograd gradients of each weight, float64 numpy (d_out, d_in)."""
    import numpy as np
    import torch

    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval().requires_grad_(False)
    total = {name: np.zeros(tuple(weight.shape)) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for sample in samples:
        gradients = torch.autograd.grad(model(**sample).loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.double().numpy() / len(samples)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
    return total


def snapshot(model) -> dict:
    """Every parameter and buffer, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
