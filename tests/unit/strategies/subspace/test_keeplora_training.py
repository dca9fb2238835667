"""What training may change under KeepLoRA: B alone, and nothing a kept direction sees; against the float64 oracle.

Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.adapters import Adapters, Factors
from mllm_keeplora.linalg import gradient_capture
from tests.oracles import subspace, training
from tests.support.keeplora import (
    ALPHA,
    OPTIONS,
    QUICK,
    RANK,
    TOLERANCE,
    Scaled,
    columns_of,
    context_of,
    delta_of,
    each_layer,
    fit,
    layer_scale,
    weights_of,
)
from tests.support.strategies import open_branch
from tests.unit.conftest import snapshot


def test_the_function_is_unchanged_when_the_branch_is_opened(taught):
    """[10]"""
    for domain in taught.domains:
        assert (domain.logits["opened"] - domain.logits["before"]).abs().max() < TOLERANCE
        assert (domain.logits["adapted"] - domain.logits["before"]).abs().max() > 1e-2, "training must do something"


def test_only_the_listed_parameters_change_in_training_and_all_of_them_do(taught):
    """[12]"""
    for domain in taught.domains:
        assert domain.opened.keys() == domain.trained.keys()
        changed = {name for name, value in domain.trained.items() if not torch.equal(value, domain.opened[name])}
        expected = {f"base_model.model.{layer}.lora_B.domain.weight" for layer in taught.adapters.layers}
        assert changed == domain.listed == expected


def test_a_is_bit_identical_after_training(taught):
    """[12]"""
    for domain, layer in each_layer(taught):
        trained = domain.trained[f"base_model.model.{layer}.lora_A.domain.weight"]
        assert torch.equal(trained, domain.branch.A[layer]) and torch.equal(domain.factors.A[layer], trained)


def test_a_fully_trained_projector_changes_beside_b_and_nothing_else(new_base, tiny_records, tmp_path):
    """[12]"""
    base = new_base("full")
    full = tuple(name for name, _ in base.model.named_parameters() if name.startswith("model.multi_modal_projector."))
    adapters = Adapters(base, "merged", 0.0, full)
    strategy, kept = Scaled(OPTIONS), {}
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, tiny_records["Alpha"])
    open_branch(strategy, context)
    before = snapshot(adapters.model)
    fit(strategy, context, tmp_path, epochs=0.5)
    changed = {name for name, value in snapshot(adapters.model).items() if not torch.equal(value, before[name])}
    branches = {f"base_model.model.{layer}.lora_B.domain.weight" for layer in base.parts.language_layers}
    assert len(full) == 4 and len(branches) == 14
    assert changed == branches | {f"base_model.model.{name}" for name in full}


def test_the_update_has_at_most_the_rank_and_lies_in_the_span_of_a(taught):
    """[9]"""
    for domain, layer in each_layer(taught):
        delta, A = delta_of(domain, layer), domain.factors.A[layer].double().numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert sigma[0] > 0 and (sigma[RANK:] < 1e-10 * sigma[0]).all()
        assert np.linalg.norm(delta @ A.T @ A - delta) < TOLERANCE * np.linalg.norm(delta)


def test_the_update_maps_kept_directions_to_zero(taught):
    """[8]"""
    for domain, layer in each_layer(taught):
        assert subspace.leak(delta_of(domain, layer), domain.kept_before[layer]) < TOLERANCE
        assert subspace.leak(domain.factors.delta(layer).numpy(), domain.kept_before[layer]) < TOLERANCE


@QUICK
@given(st.integers(0, 31), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_b_whatsoever_moves_a_protected_input(taught, which, seed, size):
    """[8]"""
    domain, layer = each_layer(taught)[which]
    rng = np.random.default_rng(seed)
    kept = domain.kept_before[layer]
    x = kept @ rng.standard_normal(kept.shape[1])
    B = size * rng.standard_normal(tuple(domain.factors.B[layer].shape))
    random = Factors(domain.factors.A, {**domain.factors.B, layer: torch.tensor(B).float()}, domain.factors.alpha)
    delta = random.delta(layer).double().numpy()
    assert np.linalg.norm(delta @ x) <= TOLERANCE * np.linalg.norm(x) * np.linalg.norm(delta)


@pytest.mark.parametrize("history", ["merged", "factors"])
@pytest.mark.parametrize("micro", [4, 2])
def test_one_gradient_descent_step_is_the_projected_gradient(new_base, tiny_records, tmp_path, history, micro):
    """[13], equation (6): -lr (s g_l)^2 A A^T G, with G of the very same batch."""
    base = new_base()
    records = tiny_records["Beta"][0:8:2]
    assert {len(record.turns) for record in records} == {2}, "equal numbers of answer tokens: both means are the same"
    adapters = Adapters(base, history, 0.0)
    generator = torch.Generator().manual_seed(1)
    A = {layer: torch.randn(2, w.shape[1], generator=generator) / 6 for layer, w in weights_of(adapters).items()}
    B = {layer: torch.randn(w.shape[0], 2, generator=generator) / 6 for layer, w in weights_of(adapters).items()}
    adapters.restore([Factors(A, B, dict.fromkeys(A, 1.0))], [])
    strategy, kept = Scaled(OPTIONS), {}
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, records)
    gradients = context.passes.gradients(len(records))
    open_branch(strategy, context)
    lr = 0.05
    facts = fit(
        strategy, context, tmp_path, lr=lr, micro_batch_size=micro, schedule="constant", warmup_ratio=0.0,
        max_grad_norm=0.0, optimizer="sgd",
    )  # fmt: skip
    assert facts["steps"] == 1
    factors, scales = adapters.read(), set()
    for layer in adapters.layers:
        scaling, g = ALPHA / RANK, layer_scale(context.layers.depth(layer))
        scales.add(scaling * g)
        expected = training.sgd_delta_weight(gradients[layer].mean.numpy(), factors.A[layer].numpy(), scaling, g, lr)
        assert np.linalg.norm(expected) > 0
        assert np.linalg.norm(factors.delta(layer).numpy() - expected) < 1e-4 * np.linalg.norm(expected)
    assert len(scales) == 3


def test_a_kept_basis_of_a_bfloat16_model_still_keeps_its_update_out(new_base, tiny_records, tmp_path):
    """[2, 8] for a model in bf16: A and B stay float32 beside it."""
    base = new_base(dtype="bfloat16")
    adapters, kept, strategy = Adapters(base, "auto", 0.0), {}, Scaled(OPTIONS)
    assert adapters.mode == "factors"
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, tiny_records["Alpha"])
    open_branch(strategy, context)
    fit(strategy, context, tmp_path, epochs=0.5)
    factors, moved = adapters.read(), 0
    for layer in adapters.layers:
        running = base.model.get_submodule(layer).lora_A["domain"].weight
        assert running.dtype == torch.float32 and torch.equal(running, factors.A[layer])
        assert np.linalg.norm(factors.A[layer].double().numpy() @ columns_of(kept)[layer], 2) < TOLERANCE
        assert subspace.leak(factors.delta(layer).numpy(), columns_of(kept)[layer]) < TOLERANCE
        moved += bool(factors.B[layer].any())
        facts = context.facts["gradient"][layer]
        shares = gradient_capture(torch.randn(3, kept[layer].d_in), kept[layer], factors.A[layer])
        assert facts.keys() - {"rank", "kept"} == shares.keys()
    assert moved == 16
