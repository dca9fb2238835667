"""Inner products and fits of low-rank products, against the whole matrices."""

import numpy as np
import pytest
import torch

from mllm_keeplora.linalg import fit_last, gram_of_products
from tests.oracles import sdlora as oracle

RANKS = (3, 1, 5, 2)


def pairs_of(seed=0, ranks=RANKS, d_out=9, d_in=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(d_out, r, generator=generator).to(dtype), torch.randn(r, d_in, generator=generator).to(dtype))
        for r in ranks
    ]


def wholes(pairs):
    return [oracle.product({"layer": (A.float(), B.float(), 1.0)}, "layer") for B, A in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inner_products_and_norms_are_those_of_the_whole_matrices(dtype):
    pairs = pairs_of(dtype=dtype)
    found, matrices = gram_of_products(pairs), wholes(pairs)
    assert found.dtype == torch.float64 and found.shape == (4, 4)
    for i, one in enumerate(matrices):
        assert float(found[i, i].sqrt()) == pytest.approx(oracle.frobenius(one), rel=1e-10)
        for j, other in enumerate(matrices):
            assert float(found[i, j]) == pytest.approx(float((one * other).sum()), rel=1e-9, abs=1e-9)


def test_a_fit_is_least_squares_on_the_whole_matrices():
    pairs = pairs_of(1)
    matrices = [{"layer": matrix} for matrix in wholes(pairs)]
    wanted, left = oracle.fit(matrices[:-1], matrices[-1])
    coefficients, found = fit_last(gram_of_products(pairs))
    assert np.allclose(coefficients, wanted, atol=1e-10)
    assert found == pytest.approx(left, rel=1e-10) and 0.01 < found < 1


def test_a_product_inside_the_span_leaves_nothing():
    (B1, A1), (B2, A2) = pairs_of(2, ranks=(2, 3))
    inside = torch.cat([2 * B1, -0.5 * B2], dim=1), torch.cat([A1, A2])
    coefficients, left = fit_last(gram_of_products([(B1, A1), (B2, A2), inside]))
    assert np.allclose(coefficients, [2, -0.5], atol=1e-6) and left < 1e-12


def test_zero_and_dependent_vectors_are_fitted_by_the_smallest_coefficients():
    (B, A), (C, D) = pairs_of(3, ranks=(2, 2))
    pairs = [(B, A), (B, A), (torch.zeros_like(C), D), (3 * B, A)]
    coefficients, left = fit_last(gram_of_products(pairs))
    assert np.allclose(coefficients, [1.5, 1.5, 0], atol=1e-6) and left < 1e-12
    assert fit_last(gram_of_products([(B, A), (torch.zeros_like(C), D)])) == (torch.zeros(1, dtype=torch.float64), 0.0)


def test_what_cannot_be_multiplied_is_refused():
    (B, A), (C, D) = pairs_of(ranks=(2, 3))
    for wrong in ([], [(B, A), (C, D[:, 1:])], [(B, A), (C[1:], D)], [(B, D)], [(B, A * torch.nan)]):
        with pytest.raises(ValueError):
            gram_of_products(wrong)
    for wrong in (torch.ones(1, 1), torch.ones(2, 3)):
        with pytest.raises(ValueError):
            fit_last(wrong)
