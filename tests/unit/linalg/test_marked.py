"""Marked entries of a product against the slow reference, in chunks of rows of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.linalg import count_marks, mark_largest, marked_entries, marked_mean
from tests.oracles import reglora as oracle

D_OUT, D_IN, RANK = 11, 13, 3  # no multiple of eight


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, D_IN, generator=generator), torch.randn(D_OUT, RANK, generator=generator)


def pairs(marks: torch.Tensor, d_in: int = D_IN) -> set[tuple[int, int]]:
    """The entries that a plane marks; none beyond the last column."""
    bits = np.unpackbits(marks.numpy(), axis=1, bitorder="little")
    assert not bits[:, d_in:].any()
    return {(int(i), int(j)) for i, j in zip(*bits.nonzero(), strict=True)}


def counts(marks: torch.Tensor) -> np.ndarray:
    planes = [np.unpackbits(plane.numpy(), axis=1, bitorder="little")[:, :D_IN] for plane in marks]
    return sum(plane.astype(float) * 2**place for place, plane in enumerate(planes))


@pytest.mark.parametrize("entries", [1, 2 * D_IN, 5 * D_IN + 3, 10**6])
@pytest.mark.parametrize("share", ["0.02", "0.3", "1"])
def test_the_largest_entries_are_marked_whatever_the_chunk(share, entries):
    A, B = factors(0)
    wanted = oracle.largest(A, B, share)
    assert pairs(mark_largest(A, B, len(wanted), entries)) == wanted
    assert len(wanted) == int(float(share) * D_OUT * D_IN) > 0


@pytest.mark.parametrize("entries", [1, 3 * D_IN, 10**6])
def test_of_equal_entries_the_first_are_marked_and_as_many_as_asked_for(entries):
    A, B = factors(0)
    assert pairs(mark_largest(A, 0 * B, 20, entries)) == {(place // D_IN, place % D_IN) for place in range(20)}
    B[6] = -B[4]
    whole = oracle.largest(A, B, "0.1")
    assert len(pairs(mark_largest(A, B, len(whole), entries))) == len(whole)
    assert not pairs(mark_largest(A, B, 0, entries))


@pytest.mark.parametrize("overlap", ["union", "multiset"])
def test_weights_are_those_of_a_union_or_of_a_multiset(overlap):
    marks, told = None, []
    for seed in (0, 1, 2, 3, 0, 0, 1):
        A, B = factors(seed)
        told.append(oracle.largest(A, B, "0.3"))
        before = None if marks is None else marks.clone()
        marks = count_marks(marks, mark_largest(A, B, len(told[-1])), overlap == "multiset")
        wanted = oracle.weights(told, (D_OUT, D_IN), overlap)
        assert np.array_equal(counts(marks), wanted)
        assert marked_entries(marks) == (wanted > 0).sum()
        assert before is None or (counts(marks) >= counts(before)).all()
    assert (wanted.max() >= 3) == (overlap == "multiset") and len(marks) == (
        1 if overlap == "union" else int(wanted.max()).bit_length()
    )


@pytest.fixture(params=["union", "multiset"])
def marks(request) -> torch.Tensor:
    found = None
    for seed in (1, 2, 1):
        A, B = factors(seed)
        found = count_marks(found, mark_largest(A, B, 20), request.param == "multiset")
    return found


@pytest.mark.parametrize("entries", [1, 4 * D_IN, 10**6])
def test_the_mean_and_both_gradients_are_those_of_the_whole_product(marks, entries):
    A, B = (each.requires_grad_() for each in factors(5))
    value = marked_mean(A, B, marks, entries)
    (7 * value).backward()
    dA, dB = oracle.gradients(A.detach(), B.detach(), counts(marks))
    assert value.item() == pytest.approx(oracle.mean_of_marked(A.detach(), B.detach(), counts(marks)), rel=1e-5)
    assert np.allclose(A.grad, 7 * dA, atol=1e-5) and np.allclose(B.grad, 7 * dB, atol=1e-5)
    whole = (torch.as_tensor(counts(marks)) * (B @ A).abs()).sum() / counts(marks).sum()
    automatic = torch.autograd.grad(whole, (A, B))
    assert torch.allclose(7 * automatic[0], A.grad, atol=1e-5) and torch.allclose(7 * automatic[1], B.grad, atol=1e-5)


def test_an_update_of_zero_costs_nothing_and_is_pulled_nowhere(marks):
    A, B = factors(5)
    A, B = A.requires_grad_(), torch.zeros_like(B).requires_grad_()
    value = marked_mean(A, B, marks)
    value.backward()
    assert value == 0 and not A.grad.any() and not B.grad.any()


def test_half_precision_factors_get_gradients_of_their_own_kind_and_no_autocast(marks):
    A, B = (each.bfloat16().requires_grad_() for each in factors(5))
    with torch.autocast("cpu", torch.bfloat16):
        value = marked_mean(A, B, marks)
    value.backward()
    assert A.grad.dtype == B.grad.dtype == torch.bfloat16
    wanted = oracle.mean_of_marked(A.detach().float(), B.detach().float(), counts(marks))
    assert value.item() == pytest.approx(wanted, rel=1e-5)


def test_where_nothing_is_marked_there_is_no_penalty():
    A, B = (each.requires_grad_() for each in factors(5))
    value = marked_mean(A, B, torch.zeros(1, D_OUT, 2, dtype=torch.uint8))
    value.backward()
    assert value == 0 and not A.grad.any()
