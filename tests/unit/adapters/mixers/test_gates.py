"""Gates and the rules for their start and updates, by themselves, against their float64 reference.

Letters in brackets are those of GainLoRA's list of tests.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.adapters.mixers.gates import GATE_LAYERS, Gate, Gates, balanced, constrained, informed_key
from mllm_keeplora.linalg import Basis, MomentAccumulator, leak
from tests.oracles import gainlora as oracle


def random_gate(seed, d=10, width=7, head="cosine") -> Gate:
    gate = Gate(d, width, head)
    gate.begin(torch.Generator().manual_seed(seed))
    return gate


def matrices(gate) -> tuple:
    down, up, key = (getattr(gate, layer).detach().double().numpy() for layer in GATE_LAYERS)
    return down, up, key[0]


def random_memory(seed, d, k) -> Basis:
    return Basis.from_columns(torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)))[0])


def moments_of(rows) -> MomentAccumulator:
    moments = MomentAccumulator(rows.shape[1], dtype=torch.float64)
    moments.update(rows.double())
    return moments


@pytest.mark.parametrize("head", ["cosine", "dot"])
def test_a_gate_is_the_one_of_the_specification(head):
    for seed in range(5):
        gate, asked = random_gate(seed, head=head), torch.randn(4, 10, generator=torch.Generator().manual_seed(seed))
        expected = [oracle.gate(row.numpy(), *matrices(gate), head) for row in asked]
        assert np.allclose(gate(asked).detach().numpy(), expected, atol=1e-6)
        assert max(expected) > 1e-3
        for place, layer in enumerate(GATE_LAYERS):
            wanted = [oracle.layer_inputs(row.numpy(), *matrices(gate)[:2])[place] for row in asked]
            assert np.allclose(gate.inputs(asked)[layer].detach().numpy(), wanted, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["cosine", "dot"]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_weights_lie_between_zero_and_one_and_are_zero_without_a_signal(seed, head, size):
    """(a)"""
    gate = random_gate(seed, head=head)
    gate.key.data *= size
    weights = gate(size * torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))).detach()
    limit = 2 / (1 + np.exp(-4)) - 1 if head == "cosine" else 1.0
    assert bool((weights >= 0).all()) and float(weights.max()) <= limit + 1e-6
    assert torch.equal(gate(torch.zeros(2, 10)), torch.zeros(2))


def test_pictures_count_as_much_as_words_and_their_absence_is_no_fault():
    features = torch.tensor([[3.0, 4.0, 600.0, 800.0], [0.3, 0.4, 0.0, 0.0]])
    assert torch.allclose(balanced(features, 2), torch.tensor([[3.0, 4.0, 3.0, 4.0], [0.3, 0.4, 0.0, 0.0]]))
    assert torch.equal(balanced(features, 4), features)


def test_more_gates_keep_the_earlier_ones_and_begin_as_the_newest():
    gates = Gates(2, 10, 7, "dot", 10)
    for number, gate in enumerate(gates.gates):
        gate.begin(torch.Generator().manual_seed(number))
    grown = gates.grown()
    assert grown.settings() == {**gates.settings(), "parts": 3}
    for new, old in zip(grown.gates, [*gates.gates, gates.newest], strict=True):
        assert all(torch.equal(getattr(new, layer), getattr(old, layer)) for layer in GATE_LAYERS)
    assert set(grown.trained()) == {f"gates.2.{layer}" for layer in GATE_LAYERS}


def test_a_new_key_is_loudest_on_the_new_domain_and_outside_of_the_memory():
    memory, key = random_memory(0, 10, 4), torch.randn(1, 10, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(20, 10, generator=torch.Generator().manual_seed(2))
    found = informed_key(key, memory, moments_of(rows))
    expected = oracle.start_key(key[0].numpy(), memory.columns.numpy(), rows.numpy())
    assert min(np.abs(found[0].numpy() - sign * expected).max() for sign in (1, -1)) < 1e-5
    assert leak(found, memory) < 1e-6 and abs(float(found.norm() / key.norm()) - 1) < 1e-6
    assert informed_key(key, memory, moments_of(memory.project(rows))) is None


def test_a_new_gate_is_silent_where_its_last_layer_sees_only_what_is_remembered():
    """(b)"""
    gate, asked = random_gate(3), torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
    p_2 = gate.inputs(asked)["key"].detach()
    memory = Basis(10)
    memory.grow(p_2, 1.0)
    other = torch.randn(8, 10, generator=torch.Generator().manual_seed(4))
    assert gate(asked).max() > 1e-2
    gate.key.data = informed_key(gate.key.detach(), memory, moments_of(gate.inputs(other)["key"].detach()))
    assert gate(asked).max() < 1e-4 < 1e-2 < gate(other).max()


@pytest.mark.parametrize("row_renorm", [False, True])
def test_a_change_is_taken_out_of_the_memory_on_the_input_side(row_renorm):
    memory, generator = random_memory(0, 10, 4), torch.Generator().manual_seed(1)
    before, after = torch.randn(7, 10, generator=generator), torch.randn(7, 10, generator=generator)
    found = constrained(after, before, memory, row_renorm)
    expected = oracle.constrained(after.numpy(), before.numpy(), memory.columns.numpy(), row_renorm)
    assert np.abs(found.numpy() - expected).max() < 1e-5
    change = float(((found - before) @ memory.columns).norm())
    assert change > 1e-1 if row_renorm else change < 1e-5
    assert torch.allclose(found.norm(dim=1), after.norm(dim=1)) == row_renorm


def test_changes_count_from_the_step_before_or_from_the_start_alike():
    memory, generator = random_memory(0, 10, 4), torch.Generator().manual_seed(1)
    start = torch.randn(7, 10, generator=generator, dtype=torch.float64).float()
    by_step, from_start, reference = start, start, start.double().numpy()
    for _ in range(20):
        step = 0.1 * torch.randn(7, 10, generator=generator)
        by_step = constrained(by_step + step, by_step, memory, False)
        from_start = constrained(from_start + step, start, memory, False)
        reference = oracle.constrained(reference + step.double().numpy(), reference, memory.columns.numpy())
    assert torch.allclose(by_step, from_start, atol=1e-5)
    assert np.abs(from_start.numpy() - reference).max() < 1e-5 < (by_step - start).abs().max()
