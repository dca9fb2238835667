"""KeepLoRA on a tiny model: two domains are taught by the strategy, the adapters and the real trainer, and recorded.

Scales differ from layer to layer (layer scale g_l != 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import settings

from mllm_keeplora.adapters import Adapters, Branch, Factors
from mllm_keeplora.config import TrainConfig
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA, KeepLoRAOptions
from mllm_keeplora.training.arguments import training_arguments
from mllm_keeplora.training.context import RunContext
from mllm_keeplora.training.fit import fit_domain
from tests.oracles import subspace
from tests.support.strategies import open_branch
from tests.unit.conftest import autograd_mean_gradients, captured_tokens, encode, logits_of, snapshot

TOLERANCE = 1e-5
RANK, ALPHA, ENERGY_WEIGHTS, ENERGY_FEATURES, SAMPLES = 4, 8.0, 0.4, 0.9, 8
CHOSEN = (0, 1, 3, 4, 6, 7, 9, 10)  # eight of twelve records, evenly spaced
OPTIONS = KeepLoRAOptions(
    rank=RANK,
    alpha=ALPHA,
    energy_weights=ENERGY_WEIGHTS,
    energy_features=ENERGY_FEATURES,
    grad_samples=SAMPLES,
    feature_samples=SAMPLES,
)
QUICK = settings(max_examples=15, deadline=None)


def layer_scale(depth):
    return 0.6 if depth is None else subspace.layer_scale(depth, 0, 2, gamma=0.2)


class Scaled(KeepLoRA):
    """KeepLoRA whose every layer has a scale g_l of its own."""

    def before_domain(self, context):
        branch = super().before_domain(context)
        alpha = {layer: layer_scale(context.layers.depth(layer)) * value for layer, value in branch.alpha.items()}
        return replace(branch, alpha=alpha)


@dataclass
class Taught:
    """All about one domain; arrays are float64 numpy, by layer."""

    gradient: dict  # mean of single-sample autograd gradients before the domain
    kept_before: dict
    kept_after: dict
    added: dict
    tokens: dict  # all features of the probed records, branch active
    opened: dict  # state of the model as the branch was opened, and as training left it
    trained: dict
    listed: set  # names of the parameters that were to train
    branch: Branch
    factors: Factors
    logits: dict  # before, opened, adapted, restored
    facts: dict


@dataclass
class Sequence:
    base: Any
    adapters: Adapters
    pristine: dict
    records: dict
    domains: list[Taught]
    added_again: dict  # the last domain's features once more


def columns_of(kept):
    return {layer: basis.columns.double().numpy().copy() for layer, basis in kept.items()}


def context_of(base, adapters, kept, records, index=0, probe_batch=3):
    collator = base.family.training_batch
    rng = torch.Generator().manual_seed(index)
    return RunContext(base, adapters, kept, DomainInfo(index, f"domain {index}"), records, collator, rng, probe_batch)


def fit(strategy, context, folder, optimizer="adamw_torch", **settings):
    values = {"lr": 1e-2, "epochs": 1.0, "batch_size": 4, "log_steps": 1, **settings}
    values["args"] = {"save_strategy": "no", "optim": optimizer}
    config = TrainConfig(**values)
    arguments = training_arguments(config, config.epochs, folder / "checkpoints", 0, None, False)
    folder.mkdir(parents=True, exist_ok=True)
    return fit_domain(strategy, context, config, config.epochs, arguments, folder / "metrics.jsonl", {})


def weights_of(adapters):
    modules = {layer: adapters.base.get_submodule(layer) for layer in adapters.layers}
    return {layer: getattr(module, "base_layer", module).weight for layer, module in modules.items()}


def modules_of(base):
    return {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}


def teach(base, history, records, folder):
    adapters = Adapters(base, history, 0.0)
    pristine = snapshot(base.model)
    batch = encode(base, records["Alpha"][:3])
    strategy, kept, domains, past = Scaled(OPTIONS), {}, [], []
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    for index, name in enumerate(records):
        samples = [encode(base, [records[name][position]]) for position in CHOSEN]
        gradient = autograd_mean_gradients(adapters.model, weights_of(adapters), samples)
        kept_before, logits = columns_of(kept), {"before": logits_of(adapters.model, batch)}
        context = context_of(base, adapters, kept, records[name], index)
        open_branch(strategy, context)
        branch, listed = adapters.branch, set(adapters.trainable())
        opened, logits["opened"] = snapshot(adapters.model), logits_of(adapters.model, batch)
        fit(strategy, context, folder / name)
        trained, logits["adapted"] = snapshot(adapters.model), logits_of(adapters.model, batch)
        tokens = captured_tokens(adapters.model, modules_of(base), samples)
        strategy.after_domain(context)
        facts, kept_after = dict(context.facts), columns_of(kept)
        strategy.after_domain(context)
        added_again = dict(context.facts["added"])
        factors = adapters.read()
        past.append(factors)
        adapters.restore(past, [])
        logits["restored"] = logits_of(adapters.model, batch)
        domains.append(
            Taught(
                gradient, kept_before, kept_after, facts["added"], tokens, opened, trained, listed,
                branch, factors, logits, facts,
            )
        )  # fmt: skip
    return Sequence(base, adapters, pristine, records, domains, added_again)


def each_layer(taught):
    """(domain, layer) of everything that has a branch; asserts that nothing is missing."""
    pairs = [(domain, layer) for domain in taught.domains for layer in domain.branch.A]
    assert len(pairs) == 2 * 16
    return pairs


def delta_of(domain, layer):
    A, B = domain.factors.A[layer].numpy(), domain.factors.B[layer].numpy()
    return subspace.delta_weight(A, B, domain.factors.alpha[layer] / A.shape[0])
