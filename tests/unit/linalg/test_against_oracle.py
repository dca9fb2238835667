"""Agreement with the slow float64 reference, over three domains of a made-up layer."""

import numpy as np
import pytest
import torch

from mllm_keeplora.linalg import Basis, MomentAccumulator, principal_subspace, rank_for_energy, top_residual_directions
from tests.oracles import subspace as oracle


def projector(columns):
    columns = np.asarray(columns, dtype=np.float64)
    return columns @ columns.T


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("use_moments", [False, True])
@pytest.mark.parametrize("reference", ["total", "residual"])
def test_three_domains_follow_the_reference(seed, use_moments, reference):
    rng = np.random.default_rng(seed)
    d_out, d_in, rank = 20, 28, 4
    weight = (rng.standard_normal((d_out, d_in)) * 0.8 ** np.arange(d_in)).astype(np.float32)
    slow = oracle.principal_subspace(weight, 0.6)
    fast = Basis.from_columns(principal_subspace(torch.from_numpy(weight), 0.6))
    assert np.abs(projector(slow) - projector(fast.columns)).max() < 1e-5
    for _ in range(3):
        gradient = rng.standard_normal((d_out, d_in)).astype(np.float32)
        slow_a = oracle.initial_a(gradient, slow, rank)
        fast_a = top_residual_directions(torch.from_numpy(gradient), fast, rank)
        assert slow_a.shape == tuple(fast_a.shape)
        assert np.abs(projector(slow_a.T) - projector(fast_a.mT)).max() < 1e-4
        features = (rng.standard_normal((90, 5)) @ rng.standard_normal((5, d_in))).astype(np.float32)
        source = torch.from_numpy(features)
        if use_moments:
            source = MomentAccumulator(d_in)
            source.update(torch.from_numpy(features))
        before = slow.shape[1]
        slow = oracle.grow(slow, features, 0.9, reference=reference)
        assert fast.grow(source, 0.9, reference=reference) == slow.shape[1] - before
        assert np.abs(projector(slow) - projector(fast.columns)).max() < 1e-4
        assert fast.coverage(source) == pytest.approx(oracle.coverage(slow, features), abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_counts_follow_the_reference(seed):
    rng = np.random.default_rng(seed)
    singular = np.sort(rng.exponential(size=rng.integers(1, 30)))[::-1].copy()
    total, covered, threshold = float((singular**2).sum()) * 1.3, float(rng.uniform(0, 0.3)), float(rng.uniform())
    values = torch.from_numpy(singular)
    assert rank_for_energy(values, threshold, total, covered) == oracle.select(singular, total, covered, threshold)
    expected = oracle.select_below_legacy(singular, total / 1.3, threshold)
    assert rank_for_energy(values, threshold, rule="below_legacy") == expected
