"""The energy rule and the principal subspace of a weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.linalg import Basis, principal_subspace, rank_for_energy

QUICK = settings(max_examples=40, deadline=None)
values_lists = st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=12)
shares = st.floats(0.0, 1.0)


def descending(values):
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@QUICK
@given(values_lists, shares, shares)
def test_rank_is_the_smallest_that_reaches_the_threshold(values, threshold, covered):
    singular = descending(values)
    rank = rank_for_energy(singular, threshold, covered=covered)
    total = float(singular.square().sum())
    if total == 0.0:
        assert rank == 0
        return
    share = [covered + float(singular[:m].square().sum()) / total for m in range(len(values) + 1)]
    assert share[rank] >= threshold - 1e-9
    assert rank == 0 or share[rank - 1] < threshold + 1e-9


@QUICK
@given(values_lists, shares, shares)
def test_rank_does_not_fall_as_the_threshold_rises(values, one, other):
    low, high = sorted((one, other))
    assert rank_for_energy(descending(values), low) <= rank_for_energy(descending(values), high)


def test_worked_counts():
    singular = torch.tensor([3.0, 2.0, 1.0])  # energies 9, 4, 1 of 14
    assert [rank_for_energy(singular, t) for t in (0.0, 0.64, 0.65, 0.92, 0.93, 1.0)] == [0, 1, 2, 2, 3, 3]
    assert rank_for_energy(singular, 0.6, total=28.0) == 3  # only half can be reached: all of them
    assert rank_for_energy(singular, 0.75, total=28.0, covered=0.5) == 1
    assert rank_for_energy(singular, 0.5, covered=0.5) == 0
    assert rank_for_energy(torch.zeros(4), 0.9) == 0
    assert rank_for_energy(torch.zeros(0), 0.9) == 0


def test_exact_ties_and_a_threshold_of_one_are_not_lost_to_rounding():
    equal = torch.full((10,), 0.1)
    assert [rank_for_energy(equal, k / 10) for k in range(11)] == list(range(11))
    long_tail = torch.logspace(0, -3, 5000, dtype=torch.float64)
    assert rank_for_energy(long_tail, 1.0) == 5000
    assert rank_for_energy(long_tail, 1.0, total=float(long_tail.flip(0).square().sum())) == 5000
    with_noise = torch.cat([torch.ones(3), torch.full((100,), 5e-8)])
    assert rank_for_energy(with_noise, 1.0) == 3
    assert rank_for_energy(torch.ones(3), 1.0, total=3.0000000000000004, covered=0.0) == 3
    assert rank_for_energy(torch.ones(3), 1.0, total=6.000000000000001, covered=0.5) == 3
    assert rank_for_energy(torch.ones(3), 0.1 + 0.2, covered=0.3) == 0  # the sum is 0.30000000000000004


def test_sums_are_float64_even_for_bf16_values():
    singular = torch.ones(1000, dtype=torch.bfloat16)
    assert rank_for_energy(singular, 0.7) == 700


@QUICK
@given(values_lists, shares)
def test_legacy_rule_counts_one_direction_fewer_but_at_least_one(values, threshold):
    singular = descending(values)
    reach = rank_for_energy(singular, threshold)
    legacy = rank_for_energy(singular, threshold, rule="below_legacy")
    assert legacy == (max(reach - 1, 1) if float(singular[0]) ** 2 > 0.0 else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([2.0, float("nan")], 0.5), "finite"),
        (([1.0, 2.0], 0.5), "descending"),
        (([1.0, -2.0], 0.5), "non-negative"),
        (([[1.0]], 0.5), "one dimension"),
        (([1.0], 1.2), r"threshold must be in \[0, 1\], got 1.2"),
        (([1.0], float("nan")), "threshold"),
        (([1.0], 0.5, float("inf")), "total"),
        (([1.0], 0.5, 0.0), "total"),
        (([1.0], 0.5, None, -0.1), "covered"),
        (([1.0], 0.5, None, 0.0, "most"), "rule must be one of reach, below_legacy, got 'most'"),
    ],
)
def test_bad_arguments_of_the_rule_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_for_energy(torch.tensor(arguments[0]), *arguments[1:])


def weight_of(d_out, d_in, seed, decay=2.0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -decay, d_in)
    mixing = torch.randn(d_in, d_in, generator=generator)
    return torch.randn(d_out, d_in, generator=generator) * scales @ mixing


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32), (1, 20), (20, 1)])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.95, 1.0])
def test_principal_subspace_equals_that_of_the_svd(shape, energy, seed):
    weight = weight_of(*shape, seed)
    basis = principal_subspace(weight, energy)
    _, singular, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = rank_for_energy(singular, energy)
    assert basis.shape == (shape[1], rank)
    assert basis.dtype == torch.float32
    exact = right[:rank].mT
    projector = basis.double() @ basis.double().mT
    assert torch.linalg.matrix_norm(projector - exact @ exact.mT, 2) < 1e-5
    assert torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(rank), 2) < 1e-5


@QUICK
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0.01, 1.0), st.integers(0, 99))
def test_principal_subspace_reaches_the_energy_and_no_column_is_spare(d_out, d_in, energy, seed):
    weight = weight_of(d_out, d_in, seed)
    basis = principal_subspace(weight, energy)
    assert 1 <= basis.shape[1] <= min(d_out, d_in)
    total = float(weight.double().square().sum())
    shares = (weight.double() @ basis.double()).square().sum(0).cumsum(0) / total
    assert shares[-1] >= energy - 1e-6
    assert basis.shape[1] == 1 or shares[-2] < energy + 1e-6


def test_principal_subspace_of_a_rank_deficient_weight_stops_at_its_rank():
    generator = torch.Generator().manual_seed(1)
    for shape in ((60, 40), (40, 60)):
        weight = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
        assert principal_subspace(weight, 1.0).shape == (shape[1], 3)


def test_principal_subspace_at_full_energy_keeps_a_weak_but_real_tail():
    weight = torch.diag(torch.tensor([1.0] + [9e-7] * 199, dtype=torch.float64))
    assert principal_subspace(weight, 1.0).shape == (200, 199)  # without the last, the share is within 1e-12 of 1


def test_principal_subspace_has_a_direction_for_the_smallest_energy():
    assert principal_subspace(weight_of(6, 6, 1), 1e-13).shape == (6, 1)


def test_principal_subspace_of_nothing_is_empty():
    assert principal_subspace(torch.randn(5, 7), 0.0).shape == (7, 0)
    assert principal_subspace(torch.zeros(5, 7), 0.9).shape == (7, 0)


def test_principal_subspace_takes_half_precision_and_fixes_signs():
    weight = weight_of(12, 16, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        basis = principal_subspace(weight.to(dtype), 0.8)
        assert basis.dtype == torch.float32
        assert torch.equal(basis, principal_subspace(-weight.to(dtype), 0.8))
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())


def test_legacy_rule_of_the_principal_subspace():
    weight = weight_of(30, 40, 5)
    for energy in (0.05, 0.6, 0.9):
        reach, legacy = principal_subspace(weight, energy), principal_subspace(weight, energy, rule="below_legacy")
        assert legacy.shape[1] == max(reach.shape[1] - 1, 1)
        assert torch.allclose(legacy, reach[:, : legacy.shape[1]], atol=1e-6)


def test_principal_subspace_refuses_what_it_cannot_use():
    weight = torch.randn(4, 6)
    weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match="weight must be finite, got 1 "):
        principal_subspace(weight, 0.5)
    with pytest.raises(ValueError, match=r"weight must have shape .* got \(4,\)"):
        principal_subspace(torch.randn(4), 0.5)
    with pytest.raises(ValueError, match=r"floating dtype, got torch.int64"):
        principal_subspace(torch.ones(4, 4, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match=r"energy must be in \[0, 1\], got 60"):
        principal_subspace(torch.randn(4, 6), 60)
    with pytest.raises(ValueError, match="rule must be one of"):
        principal_subspace(torch.randn(4, 6), 0.5, rule="sum")


def test_a_principal_subspace_is_a_basis_bit_for_bit():
    columns = principal_subspace(weight_of(64, 96, 7), 0.9)
    assert torch.equal(Basis.from_columns(columns).columns, columns)
