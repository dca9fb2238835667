"""Where a KeepLoRA domain starts: the directions A from its gradient, against the float64 oracle.

Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.linalg import Basis
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA
from mllm_keeplora.system import distributed
from tests.oracles import subspace
from tests.support.keeplora import (
    ALPHA,
    OPTIONS,
    QUICK,
    RANK,
    TOLERANCE,
    columns_of,
    context_of,
    each_layer,
    fit,
    modules_of,
)
from tests.support.strategies import open_branch

# -- A ---------------------------------------------------------------------------------------------------------------


def test_rows_of_a_are_orthonormal_and_outside_the_kept_basis(taught):
    """[1, 2]"""
    for domain, layer in each_layer(taught):
        A = domain.branch.A[layer].double().numpy()
        assert A.shape[0] == RANK
        assert np.linalg.norm(A @ A.T - np.eye(RANK), 2) < TOLERANCE
        assert np.linalg.norm(A @ domain.kept_before[layer], 2) < TOLERANCE


def test_a_spans_the_top_of_the_residual_of_the_autograd_gradient(taught):
    """Equations (2)-(4)"""
    for domain, layer in each_layer(taught):
        expected = subspace.initial_a(domain.gradient[layer], domain.kept_before[layer], RANK)
        found = domain.branch.A[layer].numpy()
        assert found.shape == expected.shape
        assert subspace.projector_difference(found.T, expected.T) < 1e-3


def test_a_captures_the_top_singular_mass_of_the_residual_gradient(taught):
    """[14]"""
    for domain, layer in each_layer(taught):
        residual = subspace.residual_gradient(domain.gradient[layer], domain.kept_before[layer])
        mass = (np.linalg.svd(residual, compute_uv=False)[:RANK] ** 2).sum()
        captured = subspace.energy(domain.gradient[layer] @ domain.branch.A[layer].double().numpy().T)
        assert captured == pytest.approx(mass, rel=1e-4)


@QUICK
@given(st.integers(0, 31), st.integers(0, 10**6))
def test_no_other_directions_outside_the_basis_capture_more(taught, which, seed):
    """[14]"""
    domain, layer = each_layer(taught)[which]
    kept, gradient = domain.kept_before[layer], domain.gradient[layer]
    vectors = np.random.default_rng(seed).standard_normal((kept.shape[0], RANK))
    other = subspace.gram_schmidt(vectors, kept)
    assert np.abs(kept.T @ other).max() < 1e-8
    captured = np.linalg.norm(gradient @ domain.branch.A[layer].double().numpy().T)
    assert np.linalg.norm(gradient @ other) <= captured * (1 + 1e-5)


def test_logged_shares_of_the_gradient_are_those_of_the_reference(taught):
    for domain, layer in each_layer(taught):
        facts = domain.facts["gradient"][layer]
        A = domain.branch.A[layer].numpy()
        shares = subspace.capture_split(domain.gradient[layer], domain.kept_before[layer], A)
        assert (facts["protected"], facts["captured"], facts["discarded"]) == pytest.approx(shares, abs=1e-4)
        assert facts["rank"] == RANK and facts["kept"] == domain.kept_before[layer].shape[1]


# -- shards, determinism, exhaustion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "world"), [(8, 2), (7, 3)])
def test_sums_over_the_shards_of_several_processes_are_those_of_one(
    new_base, tiny_records, monkeypatch, samples, world
):
    """[17]"""
    assert_shards_add_up(new_base(), tiny_records["Alpha"], monkeypatch, samples, world)


def assert_shards_add_up(base, records, monkeypatch, samples, world):
    adapters = Adapters(base, "merged", 0.0)
    context = context_of(base, adapters, {}, records, probe_batch=2)
    whole = context.passes.features(samples), context.passes.gradients(samples)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensors: None)
    told = []  # what rank 0, which runs first here, tells the others: twice in each of its two passes
    asked = itertools.count()

    def from_main(value):
        told.append(value)
        return told[next(asked) % 4]

    monkeypatch.setattr(distributed, "from_main", from_main)
    monkeypatch.setattr(distributed, "gather", lambda value: [from_main(value), value])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    sums = None
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        own = context.passes.features(samples), context.passes.gradients(samples)
        tensors = [{layer: [t.clone() for t in a.tensors()] for layer, a in kind.items()} for kind in own]
        if sums is None:
            sums = tensors
        else:
            for total, part in zip(sums, tensors, strict=True):
                for layer in total:
                    for t, added in zip(total[layer], part[layer], strict=True):
                        t.add_(added)
    for total, expected in zip(sums, whole, strict=True):
        for layer, accumulator in expected.items():
            values, totals = accumulator.tensors()
            assert torch.allclose(total[layer][0], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
            assert torch.allclose(total[layer][1], totals, rtol=1e-6)


def test_more_processes_than_records_change_nothing(new_base, tiny_records, monkeypatch):
    """[17]"""
    assert_shards_add_up(new_base(), tiny_records["Alpha"], monkeypatch, 2, 3)


def test_the_same_records_give_the_same_a(new_base, tiny_records):
    """[19]"""
    starts = []
    for probe_batch in (3, 3, 8):
        base = new_base()
        adapters, kept, strategy = Adapters(base, "merged", 0.0), {}, KeepLoRA(OPTIONS)
        strategy.prepare(context_of(base, adapters, kept, [], -1))
        open_branch(strategy, context_of(base, adapters, kept, tiny_records["Alpha"], probe_batch=probe_batch))
        starts.append(adapters.branch.A)
    for layer in starts[0]:
        assert torch.equal(starts[0][layer], starts[1][layer])
        assert torch.allclose(starts[0][layer], starts[2][layer], atol=1e-3), "batches may only round differently"


def test_an_exhausted_space_gives_fewer_directions_at_the_same_scale_and_never_one_inside(
    new_base, tiny_records, tmp_path
):
    """[20]"""
    base = new_base()
    free = dict(zip(base.parts.target_layers, (0, 1, 2, 3, RANK, 10), strict=False))
    kept, generator = {}, torch.Generator().manual_seed(0)
    for layer, module in modules_of(base).items():
        d_in = module.in_features
        columns = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
        kept[layer] = Basis.from_columns(columns[:, : d_in - free.get(layer, 2)])
    adapters, strategy = Adapters(base, "merged", 0.0), KeepLoRA(OPTIONS)
    before = columns_of(kept)
    context = context_of(base, adapters, kept, tiny_records["Alpha"])
    open_branch(strategy, context)
    for layer in base.parts.target_layers:
        room = free.get(layer, 2)
        assert (layer in adapters.branch.A) == (room > 0)
        assert context.facts["gradient"][layer]["rank"] == min(room, RANK)
        if room:
            A = adapters.branch.A[layer].double().numpy()
            assert A.shape[0] == min(room, RANK)
            assert np.linalg.norm(A @ before[layer], axis=1).max() < TOLERANCE
            assert np.linalg.norm(A @ A.T - np.eye(len(A)), 2) < TOLERANCE
            assert adapters.branch.alpha[layer] / A.shape[0] == pytest.approx(ALPHA / RANK)
    fit(strategy, context, tmp_path, epochs=0.5)
    factors = adapters.read()
    assert factors.B.keys() == adapters.branch.A.keys() and len(factors.B) == 15
    for layer in factors.B:
        assert subspace.leak(factors.delta(layer).numpy(), before[layer]) < TOLERANCE
    strategy.after_domain(context)
    for layer, basis in kept.items():
        assert basis.rank <= basis.d_in
        assert np.array_equal(basis.columns[:, : before[layer].shape[1]].double().numpy(), before[layer])
