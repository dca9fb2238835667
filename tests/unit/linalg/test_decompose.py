"""Decompositions: new columns are clean of the basis, and what lies inside it is dropped."""

import pytest
import torch

from mllm_keeplora.linalg.decompose import (
    Complement,
    fix_signs,
    largest_singular_value,
    leading_eigenvectors,
    leading_right_vectors,
    orthonormal_complement,
)

EYE = torch.eye(8, dtype=torch.float64)


def test_candidates_inside_the_basis_are_dropped_and_the_rest_keep_their_order():
    candidates = torch.stack([EYE[:, 0], EYE[:, 5], 0.6 * EYE[:, 1] + 0.8 * EYE[:, 4]], dim=1)
    assert torch.allclose(orthonormal_complement(candidates, EYE[:, :3]), EYE[:, [5, 4]])
    assert orthonormal_complement(EYE[:, :2], EYE[:, :3]).shape == (8, 0)
    assert orthonormal_complement(EYE[:, :0], EYE[:, :3]).shape == (8, 0)


def test_repeated_candidates_count_once():
    candidates = torch.stack([EYE[:, 5], EYE[:, 5], EYE[:, 6]], dim=1)
    assert torch.allclose(orthonormal_complement(candidates, EYE[:, :3]), EYE[:, [5, 6]])
    one, other = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[
        0
    ].T
    assert orthonormal_complement(torch.stack([one, one, other], dim=1), EYE[:, :0]).shape == (8, 2)


def test_new_columns_are_clean_of_a_basis_rounded_to_float32():
    generator = torch.Generator().manual_seed(1)
    kept = torch.linalg.qr(torch.randn(200, 80, generator=generator, dtype=torch.float64))[0].float().double()
    outside = torch.linalg.qr(torch.randn(200, 20, generator=generator, dtype=torch.float64))[0]
    added = orthonormal_complement(outside, kept)
    assert added.shape == (200, 20)
    assert float((kept.mT @ added).abs().max()) < 1e-13
    assert torch.allclose(added.mT @ added, torch.eye(20, dtype=torch.float64), atol=1e-13)


def test_a_column_that_projection_cannot_clean_is_refused():
    doubled = torch.stack([EYE[:, 0], EYE[:, 0]], dim=1)  # not a basis: projection reflects instead of removing
    mixed = (EYE[:, :1] + EYE[:, 4:5]) / 2**0.5
    assert orthonormal_complement(torch.cat([mixed, EYE[:, 6:7]], dim=1), doubled).shape == (8, 1)


def test_signs_make_the_largest_entry_positive():
    columns = torch.tensor([[0.6, -0.1, 0.0], [-0.8, 0.9, 0.0]])
    assert torch.equal(fix_signs(columns), torch.tensor([[-0.6, -0.1, 0.0], [0.8, 0.9, 0.0]]))
    assert fix_signs(torch.zeros(4, 0)).shape == (4, 0)


def test_both_gram_sides_give_the_right_vectors_of_the_svd():
    generator = torch.Generator().manual_seed(2)
    for shape in ((30, 12), (12, 30)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = torch.linalg.svd(matrix, full_matrices=False)[2][:5].mT
        seen = []
        found = leading_right_vectors(matrix, lambda squares, seen=seen: seen.append(squares) or 5)
        assert torch.allclose(fix_signs(found), fix_signs(expected), atol=1e-9)
        assert torch.allclose(seen[0].sqrt(), torch.linalg.svdvals(matrix), atol=1e-9)


def test_eigenvalues_come_descending_and_never_negative():
    seen = []
    leading_eigenvectors(
        torch.diag(torch.tensor([1.0, 3.0, -1e-18], dtype=torch.float64)), lambda v: seen.append(v) or 1
    )
    assert seen[0].tolist() == [3.0, 1.0, 0.0]


def test_spectral_norm_is_close_enough_for_a_noise_floor():
    generator = torch.Generator().manual_seed(3)
    for shape in ((40, 60), (60, 40), (1, 5)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        exact = float(torch.linalg.matrix_norm(matrix, 2))
        assert 0.9 * exact <= largest_singular_value(matrix) <= exact * (1 + 1e-9)
    assert largest_singular_value(torch.zeros(3, 4)) == largest_singular_value(torch.zeros(0, 4)) == 0.0
    assert largest_singular_value(1e-30 * EYE) == pytest.approx(1e-30)


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_coordinates_outside_columns_keep_lengths_and_lift_to_vectors_orthogonal_to_them(rank):
    columns = torch.linalg.qr(torch.randn(8, rank, dtype=torch.float64))[0] if rank else EYE[:, :0]
    rows = torch.randn(5, 8, dtype=torch.float64)
    complement = Complement(columns)
    found = complement.coordinates(rows)
    assert found.shape == (5, 8 - rank)
    lifted = complement.lift(found.mT)
    assert torch.allclose(lifted.mT, rows - rows @ columns @ columns.mT)
    assert torch.allclose(lifted.norm(dim=0), found.norm(dim=1))
