"""Orthonormal restarts, energy problems and the recalibration against slow references and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.linalg import general_directions, isolated_directions, orthonormal_rows, recalibration
from tests.oracles import loda as oracle
from tests.oracles import slao


def moments(seed: int, d: int = 8, n: int = 40) -> torch.Tensor:
    X = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = X * torch.linspace(0.2, 2, d, dtype=torch.float64).roll(seed)
    return X.mT @ X / n


def orthonormal(seed: int, d: int, r: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, r)))[0]


@pytest.fixture
def A() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_made_orthonormal_each_near_its_own(A, dtype):
    A = A.to(dtype)
    rows, R = orthonormal_rows(A)
    wanted, R_wanted = slao.restart(A.double().numpy())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert np.allclose(rows, wanted, atol=tolerance) and np.allclose(R, R_wanted, atol=tolerance)
    assert torch.allclose(rows @ rows.mT, torch.eye(3, dtype=rows.dtype), atol=tolerance)
    assert (R.diagonal() >= 0).all()
    assert torch.allclose(orthonormal_rows(rows)[0], rows, atol=tolerance)


def test_a_zero_row_gets_a_direction_and_too_many_rows_are_refused(A):
    A[1] = 0
    rows, R = orthonormal_rows(A)
    assert torch.allclose(rows @ rows.mT, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(R.mT @ rows, A, atol=1e-12)
    with pytest.raises(ValueError, match=r"as many rows as columns, got shape \(8, 3\)"):
        orthonormal_rows(A.mT)


def test_general_directions_have_more_energy_than_any_others():
    S = moments(0) + moments(1)
    U = general_directions(S, 3).numpy()
    best = oracle.energy(U, S.numpy())
    assert np.isclose(best, oracle.energy(oracle.general(moments(0).numpy(), moments(1).numpy(), 3), S.numpy()))
    assert all(oracle.energy(orthonormal(seed, 8, 3), S.numpy()) <= best for seed in range(200))


def test_isolated_directions_solve_the_generalised_problem():
    old, new = moments(0), moments(3)
    U, mu, eps = isolated_directions(old, new, 3)
    wanted, mu_wanted = oracle.isolated(old.numpy(), new.numpy(), 3, eps)
    damped = old + eps * torch.eye(8, dtype=torch.float64)
    assert eps == pytest.approx(1e-6 * float(old.trace()) / 8) and np.allclose(mu, mu_wanted)
    assert np.allclose(np.abs(U.numpy()), np.abs(wanted), atol=1e-8)
    assert torch.allclose(U.mT @ damped @ U, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(new @ U, damped @ U * mu, atol=1e-9)
    for seed in range(200):
        u = orthonormal(seed, 8, 1)[:, 0]
        assert u @ new.numpy() @ u / (u @ damped.numpy() @ u) <= float(mu[0]) + 1e-9


def test_a_ridge_grows_until_old_moments_have_a_factor():
    old = torch.diag(torch.tensor([1.0, 1.0, -1e-3, 0.0], dtype=torch.float64))  # as rounding could leave them
    _, _, eps = isolated_directions(old, torch.eye(4, dtype=torch.float64), 2)
    first = 1e-6 * float(old.trace()) / 4
    assert eps > 1e-3 and np.isclose(np.log10(eps / first) % 1.0, 0.0, atol=1e-9)
    U, _, _ = isolated_directions(torch.zeros(4, 4), moments(1, 4), 2)
    assert torch.isfinite(U).all()


def test_isolated_directions_lie_where_old_inputs_never_were():
    old, new = torch.zeros(6, 6), torch.zeros(6, 6)
    old[:3, :3], new[3:, 3:] = moments(0, 3).float(), moments(1, 3).float()
    U, _, _ = isolated_directions(old, new, 2)
    assert float(U[:3].abs().max()) < 1e-9 * float(U.abs().max())


@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_a_recalibration_solves_the_normal_equations_and_is_no_worse_than_all_or_nothing(A, gamma):
    old, new, rows = moments(0), moments(3), A.numpy()
    full = recalibration(A, old, new, gamma, full=True).numpy()
    assert np.allclose(full, oracle.recalibrated(rows, old.numpy(), new.numpy(), gamma))
    B = np.random.default_rng(0).standard_normal((5, 3))

    def J(weights):
        return oracle.error(B, rows, weights, old.numpy(), new.numpy(), gamma)

    diagonal = recalibration(A, old, new, gamma)
    wanted = oracle.recalibrated_diagonally(rows, old.numpy(), new.numpy(), gamma)
    assert np.allclose(diagonal, np.diag(wanted)) and ((wanted > 0) & (wanted < 1)).all()
    assert J(full) <= min(J(np.eye(3)), J(np.zeros((3, 3))), J(diagonal.numpy()))
    moved = np.random.default_rng(1).standard_normal((50, 3, 3))
    assert all(J(full) <= J(full + 0.1 * step) for step in moved)


def test_a_recalibration_keeps_what_old_inputs_do_not_see_and_drops_what_new_ones_do_not(A):
    S, none = moments(0), torch.zeros(8, 8)
    for full in (False, True):
        assert torch.allclose(recalibration(A, none, S, 3.0, full), torch.eye(3, dtype=torch.float64), atol=1e-9)
        assert torch.allclose(recalibration(A, S, none, 3.0, full), torch.zeros(3, 3, dtype=torch.float64), atol=1e-9)
    assert torch.equal(recalibration(A, none, none, 3.0), torch.eye(3, dtype=torch.float64))
    less, more = (recalibration(A, S, moments(3), gamma).diagonal() for gamma in (1.0, 3.0))
    assert (less < more).all()


def test_a_full_recalibration_is_the_diagonal_one_where_directions_do_not_mix():
    old, new = torch.diag(torch.arange(1.0, 5)), torch.diag(torch.arange(4.0, 0, -1))
    A = torch.eye(4)[:2]
    assert torch.allclose(recalibration(A, old, new, 3.0), recalibration(A, old, new, 3.0, full=True), atol=1e-9)
