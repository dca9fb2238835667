"""Random branches, factors and shifts for a tiny model."""

import pytest
import torch

from mllm_keeplora.adapters import Adapters, Branch, Factors
from tests.unit.conftest import encode, snapshot

HISTORIES = ("merged", "factors")
ABSENT = "model.language_model.layers.1.mlp.down_proj"  # the layer that has no room in some tests


@pytest.fixture
def batch(base, tiny_records):
    return encode(base, tiny_records["Alpha"][:4])


@pytest.fixture
def pristine(base):
    return snapshot(base.model)


def random_branch(base, seed, rank=3, without=(), train=("B",)):
    generator = torch.Generator().manual_seed(seed)
    A, alpha = {}, {}
    for number, layer in enumerate(base.parts.target_layers):
        if layer not in without:
            own = 1 + (rank + number) % rank  # ranks and scales differ from layer to layer
            A[layer] = torch.randn(own, base.model.get_submodule(layer).in_features, generator=generator) / 4
            alpha[layer] = 0.5 + number / 4
    return Branch(A, alpha, train)


def random_factors(base, seed, size=0.3, **options):
    branch = random_branch(base, seed, **options)
    generator = torch.Generator().manual_seed(seed + 1000)
    B = {
        layer: size * torch.randn(base.model.get_submodule(layer).out_features, A.shape[0], generator=generator)
        for layer, A in branch.A.items()
    }
    return Factors(branch.A, B, branch.alpha)


def branch_of(factors, train=("B",)):
    return Branch(factors.A, factors.alpha, train)


def adapt(base, history="merged", full=()):
    return Adapters(base, history, 0.0, full)


def projector_parameters(base):
    return tuple(name for name, _ in base.model.named_parameters() if name.startswith(base.parts.projectors[0]))


def random_shift(base, seed):
    generator = torch.Generator().manual_seed(seed)
    names = projector_parameters(base)
    return {name: 0.1 * torch.randn(base.model.get_parameter(name).shape, generator=generator) for name in names}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
