"""Any strategy on a tiny model: contexts over domains in memory, one domain learnt with the real trainer."""

from __future__ import annotations

import numpy as np
import torch

from mllm_keeplora.adapters import Adapters, Factors
from mllm_keeplora.adapters.stored import LIVE, Past
from mllm_keeplora.config import TrainConfig
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.strategies.context import Context
from mllm_keeplora.strategies.passes import Sources
from mllm_keeplora.training.arguments import training_arguments
from mllm_keeplora.training.fit import fit_domain


def context_of(base, adapters: Adapters, records: dict, index: int, kept: dict | None = None, **options) -> Context:
    """The context of a domain by its place among `records` (name -> its training records); -1 is before the first."""
    names = list(records)
    name = names[index] if index >= 0 else "base"
    values = {
        "kept": {} if kept is None else kept,
        "domain": DomainInfo(index, name, len(names)),
        "records": records.get(name, []),
        "collate": base.family.training_batch,
        "rng": torch.Generator().manual_seed(index + 1),
        "probe_batch_size": 3,
        "sources": Sources(trained=records.__getitem__, names=names),
        "seed": index + 1,
    }
    return Context(base, adapters, **{**values, **options})


def open_branch(strategy, context: Context) -> None:
    """Open the branch that a strategy begins a domain with, as the stage `gradient` does."""
    begun = strategy.before_domain(context)
    if begun is not None:
        context.branches.open(begun)


def fit(strategy, context: Context, folder, args: dict | None = None, **settings) -> dict:
    """Train the open branch; without checkpoints, unless `args` (of the Trainer) asks for them."""
    config = TrainConfig(
        **{"lr": 1e-2, "epochs": 1.0, "batch_size": 4, "log_steps": 1, **settings},
        args={"save_strategy": "no", **(args or {})},
    )
    arguments = training_arguments(config, config.epochs, folder / "checkpoints", 0, None, False)
    folder.mkdir(parents=True, exist_ok=True)
    return fit_domain(strategy, context, config, config.epochs, arguments, folder / "metrics.jsonl", {})


def learn(strategy, context: Context, folder, **settings) -> Factors:
    """One domain from its branch to its statistics; afterwards the model is the one that the domain leaves."""
    branches = context.branches
    open_branch(strategy, context)
    fit(strategy, context, folder, **settings)
    strategy.after_domain(context)
    factors, carried = branches.read(), branches.branch.carried
    replacement = context.replacement
    answering = factors if replacement is None else replacement.factors
    stands_alone = carried or (replacement is not None and replacement.instead_of == "all")
    past = Past([answering] if stands_alone else [*branches.past, answering])
    mixer = context.answering or branches.mixer
    if strategy.combine == "sum":
        past = mixer.summed(past)
    branches.restore(past.factors, branches.past_full, mixer if strategy.combine in LIVE else None)
    return factors


def alone(base, adapters: Adapters, records) -> tuple[list[list[float]], dict]:
    """Records run one by one: the losses of each one's answer tokens, and the gradient of the mean over all tokens.

    The gradient is plain autograd's, float64 numpy by the name of the trained parameter.
    """
    trained, losses = adapters.trainable(), []
    total = {name: np.zeros(tuple(parameter.shape)) for name, parameter in trained.items()}
    adapters.model.eval()
    for record in records:
        batch = base.family.training_batch([record])
        labels = batch.pop("labels")[0]
        chances = adapters.model(**batch).logits[0].log_softmax(dim=-1)
        answers = [place for place in range(len(labels)) if labels[place] != -100]
        tokens = torch.stack([-chances[place - 1, labels[place]] for place in answers])
        losses.append(tokens.tolist())
        gradients = torch.autograd.grad(tokens.sum(), list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.double().numpy()
    count = sum(map(len, losses))
    return losses, {name: gradient / count for name, gradient in total.items()}
