"""Merging task vectors against the slow reference, and against peft where it has the rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.linalg import damped, dropped, elected_mean, nearest_product, regressed, trimmed
from tests.oracles import merge as oracle


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3)]


def arrays(tensors) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0, 0.001])
def test_trimming_keeps_the_largest_entries(deltas, density):
    found = trimmed(deltas[0], density)
    assert np.array_equal(found.numpy(), oracle.trimmed(deltas[0].numpy(), density))
    assert int((found != 0).sum()) == max(1, int(density * 35))


def test_an_elected_mean_is_of_the_entries_that_have_the_sign_of_the_sum(deltas):
    deltas = [trimmed(delta, 0.5) for delta in deltas]
    found = elected_mean(deltas)
    assert np.allclose(found, oracle.elected(arrays(deltas)), atol=1e-12)
    assert not torch.allclose(found, sum(deltas) / 3)


def test_two_opposite_entries_elect_the_positive_one():
    assert elected_mean([torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_is_that_of_peft(deltas, density):
    from peft.utils.merge_utils import ties

    found = elected_mean([trimmed(delta, density) for delta in deltas])
    assert torch.allclose(found, ties(deltas, torch.ones(3, dtype=torch.float64), density), atol=1e-12)


def test_dropped_entries_are_made_up_for_by_the_others(deltas):
    found = dropped(deltas[0], 0.6, torch.Generator().manual_seed(1))
    kept = (found != 0).numpy()
    assert 0 < kept.sum() < 35 and np.allclose(found, oracle.dropped(deltas[0].numpy(), kept, 0.6))
    many = torch.ones(200, 200)
    assert dropped(many, 0.9, torch.Generator().manual_seed(2)).mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(dropped(many, 0.0, torch.Generator()), many)


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_is_that_of_peft_with_the_same_masks(deltas, rule, monkeypatch):
    from peft.utils import merge_utils

    masked = [dropped(delta, 0.3, torch.Generator().manual_seed(i)) for i, delta in enumerate(deltas)]
    masks = iter([(delta != 0).double() for delta in masked])
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda chances: next(masks))
    wanted = getattr(merge_utils, rule)(deltas, torch.ones(3, dtype=torch.float64), 0.7)
    found = sum(masked) if rule == "dare_linear" else elected_mean(masked)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("off_diagonal", [0.9, 0.0, 1.0])
def test_a_regression_by_factors_is_that_of_whole_weights(off_diagonal):
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    start, pairs, inputs = (
        random(5, 7),
        [(random(5, 2), random(2, 7)) for _ in range(3)],
        [random(40, 7) for _ in "abc"],
    )
    moments = [damped(X.mT @ X / len(X), off_diagonal) for X in inputs]
    A = regressed([A @ G for (_, A), G in zip(pairs, moments, strict=True)], sum(moments))
    found = start + torch.cat([B for B, _ in pairs], dim=1) @ A
    wanted = oracle.regmean([(start + B @ A).numpy() for B, A in pairs], arrays(inputs), off_diagonal)
    assert np.allclose(found, wanted, atol=1e-6)
    if off_diagonal == 1.0:  # the fit itself: no other weight is nearer to all answers

        def loss(W):
            return sum(((X @ (W - start - B @ A).mT) ** 2).mean() for X, (B, A) in zip(inputs, pairs, strict=True))

        assert all(loss(found) < loss(found + 1e-2 * random(5, 7)) for _ in range(20))


def test_inputs_that_never_were_leave_a_regression_finite():
    moments = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    found = regressed([torch.ones(1, 3) @ moments], moments)
    assert torch.allclose(found, torch.tensor([[1.0, 1.0, 0.0]], dtype=found.dtype), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5, 99])
def test_the_nearest_product_is_the_truncated_decomposition(deltas, rank):
    B, A, lost = nearest_product(deltas[0], rank)
    wanted, share = oracle.nearest(deltas[0].numpy(), rank)
    assert A.shape[0] == B.shape[1] == min(rank, 5)
    assert np.allclose(B @ A, wanted, atol=1e-5) and lost == pytest.approx(share, abs=1e-9)


def test_a_zero_matrix_has_a_product():
    B, A, lost = nearest_product(torch.zeros(3, 4), 2)
    assert (B.shape, A.shape, lost) == ((3, 1), (1, 4), 0.0) and not (B @ A).any()
