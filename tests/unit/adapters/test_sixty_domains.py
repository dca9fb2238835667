"""A past of sixty domains: what is evaluated still keeps out of what was protected, at the cost of one delta."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm_keeplora.adapters import Factors
from mllm_keeplora.adapters.factors import concatenate
from mllm_keeplora.adapters.history import split_at_break_even
from mllm_keeplora.linalg import Basis, leak
from tests.unit.adapters.conftest import adapt
from tests.unit.conftest import logits_of

DOMAINS, RANK, UPDATE = 60, 2, 0.02  # UPDATE: ||dW|| / ||W|| of a domain


@pytest.fixture(scope="module")
def long_past(new_base):
    """Sixty domains' factors, and per layer the basis that the last of them had to keep out of."""
    base, generator = new_base(), torch.Generator().manual_seed(0)
    orders, past = {}, []
    for layer in base.parts.target_layers:
        d_in = base.model.get_submodule(layer).in_features
        orders[layer] = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
    for number in range(1, DOMAINS + 1):
        A, B = {}, {}
        for layer, directions in orders.items():
            weight = base.model.get_submodule(layer).weight
            free = directions[:, kept_by(number, directions) :]
            A[layer] = torch.linalg.qr(free @ torch.randn(free.shape[1], RANK, generator=generator))[0].mT.contiguous()
            B[layer] = torch.randn(weight.shape[0], RANK, generator=generator)
            B[layer] *= UPDATE * weight.detach().norm() / B[layer].norm()
        past.append(Factors(A, B, dict.fromkeys(A, float(RANK))))
    return past, {layer: Basis.from_columns(each[:, : kept_by(DOMAINS, each)]) for layer, each in orders.items()}


def kept_by(number: int, directions: torch.Tensor) -> int:
    """A fifth of all directions at the start, four fifths at the end."""
    return directions.shape[1] * (DOMAINS + 3 * number) // (5 * DOMAINS)


def test_the_merged_weights_change_by_the_last_domain_outside_its_basis(new_base, long_past):
    past, kept = long_past
    adapters = adapt(new_base(), "merged")
    weights = []
    for history in (past[:-1], past):
        adapters.restore(history, [])
        weights.append({layer: adapters.weight(layer).detach().clone() for layer in kept})
    for layer, basis in kept.items():
        assert leak(weights[1][layer] - weights[0][layer], basis) < 1e-5, layer


def test_factors_and_the_dense_deltas_that_take_over_keep_out_of_the_basis(new_base, long_past):
    past, kept = long_past
    assert max(leak(past[-1].delta(layer), basis) for layer, basis in kept.items()) < 1e-5
    _, before = split_at_break_even(concatenate(past[:-1]))
    few, after = split_at_break_even(concatenate(past))
    assert set(after) == set(kept) and not few.A, "sixty domains are past the break-even of every layer"
    for layer, basis in kept.items():
        assert leak(after[layer] - before[layer], basis) < 1e-5, layer


def test_a_forward_costs_no_more_after_sixty_domains_than_after_thirty(new_base, long_past, batch):
    past, _ = long_past
    base = new_base(dtype="bfloat16")
    adapters = adapt(base, "factors")
    operations = {}
    for count in (0, 1, 30, DOMAINS):
        adapters.restore(past[:count], [])
        with FlopCounterMode(display=False) as counter:
            logits_of(adapters.model, batch)
        operations[count] = counter.get_total_flops()
    assert operations[0] < operations[1] < operations[30] == operations[DOMAINS]
