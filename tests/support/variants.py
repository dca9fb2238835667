"""A KeepLoRA domain on a tiny model under any options, stage by stage and without the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA, KeepLoRAOptions
from mllm_keeplora.training.context import RunContext
from mllm_keeplora.training.passes import Sources
from tests.oracles import subspace
from tests.support.keeplora import CHOSEN, OPTIONS, TOLERANCE, columns_of, modules_of, weights_of
from tests.support.strategies import open_branch
from tests.unit.conftest import autograd_mean_gradients, captured_tokens, encode

NUM_LAYERS = 16


@dataclass
class Domain:
    """A domain that was begun; arrays are float64 numpy, by layer."""

    base: Any
    adapters: Adapters
    strategy: KeepLoRA
    kept: dict
    context: RunContext
    kept_before: dict

    @property
    def samples(self) -> list[dict]:
        """The records that data passes look at, one by one."""
        return [encode(self.base, [self.context.data.records[position]]) for position in CHOSEN]

    def gradients(self) -> dict:
        """Mean gradients by plain autograd, of the model as it is now."""
        return autograd_mean_gradients(self.adapters.model, weights_of(self.adapters), self.samples)

    def tokens(self) -> dict:
        """All features that plain hooks see, of the model as it is now."""
        return captured_tokens(self.adapters.model, modules_of(self.base), self.samples)

    def finish(self) -> dict:
        """Run what follows the training; returns the kept columns."""
        self.strategy.after_domain(self.context)
        return columns_of(self.kept)


def options_of(**changes) -> KeepLoRAOptions:
    return KeepLoRAOptions(**{**OPTIONS.model_dump(), **changes})


def begin(base, records, history="merged", sets=None, kept=None, seed=0, **changes) -> Domain:
    """Everything before the branch is opened: adapters, and the first kept bases unless some are given.

    `sets`: name -> records of the anchor sets to use; it is asserted that exactly these are asked for.
    """
    sets, asked = sets or {}, set()

    def anchors(name):
        asked.add(name)
        return sets[name]

    changes = {"anchors": tuple(sets), **changes}
    adapters = Adapters(base, history, 0.0)
    strategy, kept = KeepLoRA(options_of(**changes)), {} if kept is None else kept
    collator, generator = base.family.training_batch, torch.Generator().manual_seed(seed)

    def context(index, records):
        info = DomainInfo(index, f"domain {index}")
        return RunContext(base, adapters, kept, info, records, collator, generator, 3, Sources(anchors))

    if not kept:
        strategy.prepare(context(-1, []))
        assert asked == set(sets)
    return Domain(base, adapters, strategy, kept, context(0, records), columns_of(kept))


def opened(base, records, **settings) -> Domain:
    """`begin`, then the branch is opened as the strategy wants it."""
    domain = begin(base, records, **settings)
    open_branch(domain.strategy, domain.context)
    return domain


def disturb(adapters, size=0.1, seed=0) -> None:
    """Move all that trains at random: a training that takes no time."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


def pristine_weights(base) -> dict:
    return {layer: module.weight.detach().double().numpy().copy() for layer, module in modules_of(base).items()}


def assert_bases(found, expected, tolerance=TOLERANCE) -> None:
    """Same subspaces, of orthonormal columns. [3]"""
    assert found.keys() == expected.keys() and len(found) == NUM_LAYERS
    for layer, columns in found.items():
        assert columns.shape == expected[layer].shape, layer
        assert np.linalg.norm(columns.T @ columns - np.eye(columns.shape[1])) < TOLERANCE
        assert subspace.projector_difference(columns, expected[layer]) < tolerance
