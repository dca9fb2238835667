"""KeepLoRA on a toy network, end to end in float64 numpy, following the pseudo-code of section 2.8 line by line."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tests.oracles import subspace, training


@dataclass
class Recipe:
    """All numbers of a toy run.

    layer_scales: one g_l per layer, empty for 1 everywhere. feature_source: "activations" (layer inputs) or
    "post_gradient" (mean gradient after the merge). anchors: samples whose features join the basis before domain 0.
    """

    rank: int = 2
    scaling: float = 2.0
    energy_weights: float = 0.6
    energy_features: float = 0.99
    lr: float = 0.05
    num_steps: int = 5
    loss: str = "squared"
    activation: str = "tanh"
    layer_scales: tuple = ()
    feature_source: str = "activations"
    anchors: np.ndarray | None = None
    energy_anchor: float = 0.99


@dataclass
class DomainRecord:
    """State around one domain, one entry per layer in every list.

    gradient: mean gradient before training; kept_before / kept_after: bases Q_{t-1} and Q_t; a, b: the adapter
    after training; weights: merged weights; losses: mean loss before each step and once more after the last.
    """

    gradient: list
    kept_before: list
    a: list
    b: list
    weights: list
    kept_after: list
    losses: list = field(default_factory=list)


def initial_bases(weights, recipe):
    """Q_0 by equation (1), and section 14 if the recipe has anchors."""
    bases = [subspace.principal_subspace(weight, recipe.energy_weights) for weight in weights]
    if recipe.anchors is not None:
        features = training.collect_features(weights, recipe.anchors, recipe.activation)
        pairs = zip(bases, features, strict=True)
        bases = [subspace.grow(basis, rows, recipe.energy_anchor) for basis, rows in pairs]
    return bases


def layer_factors(recipe, num_layers):
    """s * g_l for every layer."""
    layer_scales = recipe.layer_scales or (1.0,) * num_layers
    return [recipe.scaling * g for g in layer_scales]


def train_b(weights, a, samples, targets, recipe):
    """Section 2.5: full-batch gradient descent on B from zero, everything else frozen. Returns (B, losses)."""
    layer_scales = recipe.layer_scales or (1.0,) * len(weights)
    factors = layer_factors(recipe, len(weights))
    b = [np.zeros((weight.shape[0], rows.shape[0])) for weight, rows in zip(weights, a, strict=True)]
    losses = []
    for step in range(recipe.num_steps + 1):
        adapted = [subspace.merge(weights[i], [(a[i], b[i], factors[i])]) for i in range(len(weights))]
        losses.append(training.mean_loss(adapted, samples, targets, recipe.loss, recipe.activation))
        if step == recipe.num_steps:
            break
        gradient = training.mean_gradient(adapted, samples, targets, recipe.loss, recipe.activation)
        b = [
            training.sgd_step_on_b(b[i], gradient[i], a[i], recipe.scaling, layer_scales[i], recipe.lr)
            for i in range(len(weights))
        ]
    return b, losses


def features_of_domain(weights, samples, targets, recipe):
    """Section 2.7 and option D2: rows to protect, per layer, at the merged weights."""
    if recipe.feature_source == "activations":
        return training.collect_features(weights, samples, recipe.activation)
    return training.mean_gradient(weights, samples, targets, recipe.loss, recipe.activation)


def run(weights, domains, recipe):
    """Learn `domains`, a list of (samples, targets), from pristine `weights`; returns one DomainRecord each.

    Equations (1)-(4), (5b), (7)-(10) and, if the recipe has layer scales, (11).
    """
    pristine = [subspace.as_float64(weight) for weight in weights]
    factors = layer_factors(recipe, len(pristine))
    stack = [[] for _ in pristine]
    bases = initial_bases(pristine, recipe)
    current = pristine
    records = []
    for samples, targets in domains:
        gradient = training.mean_gradient(current, samples, targets, recipe.loss, recipe.activation)
        a = [subspace.initial_a(g, q, recipe.rank) for g, q in zip(gradient, bases, strict=True)]
        b, losses = train_b(current, a, samples, targets, recipe)
        for i in range(len(pristine)):
            stack[i].append((a[i], b[i], factors[i]))
        current = [subspace.merge(pristine[i], stack[i]) for i in range(len(pristine))]
        features = features_of_domain(current, samples, targets, recipe)
        grown = [subspace.grow(q, rows, recipe.energy_features) for q, rows in zip(bases, features, strict=True)]
        records.append(DomainRecord(gradient, bases, a, b, current, grown, losses))
        bases = grown
    return records


def score_matrix(records, domains, recipe):
    """Loss on every domain after every stage, a T x T nested list (lower is better)."""
    return [
        [training.mean_loss(record.weights, x, y, recipe.loss, recipe.activation) for x, y in domains]
        for record in records
    ]


def toy_stream(seed, d_in, d_out, num_domains, num_samples, rank=3, loss="squared"):
    """Deterministic toy domains: inputs of each domain lie near its own `rank`-dimensional subspace."""
    rng = np.random.default_rng(seed)
    domains = []
    for _ in range(num_domains):
        directions = rng.standard_normal((rank, d_in))
        samples = rng.standard_normal((num_samples, rank)) @ directions / np.sqrt(rank)
        samples = samples + 0.01 * rng.standard_normal((num_samples, d_in))
        if loss == "squared":
            targets = samples @ rng.standard_normal((d_in, d_out)) / np.sqrt(d_in)
        else:
            targets = np.argmax(samples @ rng.standard_normal((d_in, d_out)), axis=1)
        domains.append((samples, targets))
    return domains


def toy_weights(seed, sizes):
    """Random weights [(d1, d0), (d2, d1), ...] for sizes (d0, d1, d2, ...) with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    weights = []
    for d_in, d_out in pairwise(sizes):
        left, _ = np.linalg.qr(rng.standard_normal((d_out, d_out)))
        right, _ = np.linalg.qr(rng.standard_normal((d_in, d_in)))
        k = min(d_in, d_out)
        weights.append(left[:, :k] @ np.diag(0.8 ** np.arange(k)) @ right[:, :k].T)
    return weights
