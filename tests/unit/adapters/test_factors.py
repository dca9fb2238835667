"""A branch as numbers: on disk bit for bit, in peft's own format, and as a sum."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.adapters import Adapters, Branch, Factors, concatenate
from tests.oracles import subspace as oracle
from tests.unit.conftest import encode, logits_of

QUICK = settings(max_examples=10, deadline=None)
LAYERS = ("tower.layers.1.q", "tower.layers.10.q", "tower.layers.1.down")
SIZES = {LAYERS[0]: (6, 5), LAYERS[1]: (6, 5), LAYERS[2]: (5, 9)}  # (d_out, d_in)

ranks_of_layers = st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 4), min_size=1)


def random_factors(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    A = {layer: torch.randn(rank, SIZES[layer][1], generator=generator) for layer, rank in ranks.items()}
    B = {layer: torch.randn(SIZES[layer][0], rank, generator=generator) for layer, rank in ranks.items()}
    alpha = {layer: float(torch.rand(1, generator=generator)) + 0.1 for layer in ranks}
    return Factors(A, B, alpha)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@QUICK
@given(ranks_of_layers, st.integers(0, 99))
def test_factors_come_back_from_disk_bit_for_bit(ranks, seed):
    factors = random_factors(ranks, seed)
    with tempfile.TemporaryDirectory() as folder:
        factors.save(Path(folder))
        stored = Factors.load(Path(folder))
    assert same(stored.A, factors.A) and same(stored.B, factors.B) and stored.alpha == factors.alpha


@QUICK
@given(ranks_of_layers, st.integers(0, 99), st.sampled_from([("B",), ("A",), ("A", "B")]))
def test_a_branch_comes_back_from_disk_bit_for_bit_and_in_order(ranks, seed, train):
    factors = random_factors(ranks, seed)
    branch = Branch(factors.A, factors.alpha, train)
    with tempfile.TemporaryDirectory() as folder:
        branch.save(Path(folder) / "init.safetensors")
        stored = Branch.load(Path(folder) / "init.safetensors")
    assert same(stored.A, branch.A) and list(stored.A) == list(branch.A)
    assert stored.alpha == branch.alpha and stored.train == train and stored.ranks == ranks


@QUICK
@given(st.lists(ranks_of_layers, min_size=1, max_size=4), st.integers(0, 99))
def test_concatenated_branches_are_the_sum_of_their_deltas(history, seed):
    past = [random_factors(ranks, seed + number) for number, ranks in enumerate(history)]
    together = concatenate(past)
    assert set(together.A) == {layer for ranks in history for layer in ranks}
    for layer in together.A:
        own = [factors for factors in past if layer in factors.A]
        scales = [(f.A[layer].numpy(), f.B[layer].numpy(), f.alpha[layer] / f.A[layer].shape[0]) for f in own]
        expected = oracle.merge(np.zeros(SIZES[layer]), scales)
        assert together.scaling(layer) == 1.0
        assert together.A[layer].shape[0] == sum(f.A[layer].shape[0] for f in own)
        assert np.abs(together.delta(layer).numpy() - expected).max() < 1e-5


def test_delta_is_alpha_over_rank_times_b_a():
    factors = random_factors({LAYERS[2]: 4}, 0)
    factors.alpha[LAYERS[2]] = 2.0
    expected = oracle.delta_weight(factors.A[LAYERS[2]].numpy(), factors.B[LAYERS[2]].numpy(), 2.0 / 4)
    assert np.abs(factors.delta(LAYERS[2]).numpy() - expected).max() < 1e-6


def test_factors_that_are_not_numbers_are_never_taken_for_saved(tmp_path):
    factors = random_factors({LAYERS[0]: 2}, 0)
    factors.B[LAYERS[0]][1, 1] = float("inf")
    with pytest.raises(RuntimeError, match=r"layers\.1\.q\.lora_B"):
        factors.save(tmp_path)


def test_a_branch_needs_a_scale_for_every_layer():
    with pytest.raises(AssertionError):
        Branch({LAYERS[0]: torch.zeros(1, 5)}, {})


def test_plain_peft_loads_the_saved_factors_into_a_fresh_base_with_the_same_logits(new_base, tiny_records, tmp_path):
    from peft import PeftModel

    base, fresh = new_base(), new_base()
    batch = encode(base, tiny_records["Beta"][:3])
    generator = torch.Generator().manual_seed(3)
    A, B, alpha = {}, {}, {}
    for number, layer in enumerate(base.parts.target_layers[1:]):  # the first layer has no room
        module = base.model.get_submodule(layer)
        A[layer] = torch.randn(1 + number % 3, module.in_features, generator=generator)
        B[layer] = 0.05 * torch.randn(module.out_features, 1 + number % 3, generator=generator)
        alpha[layer] = 0.5 + number / 5
    factors = Factors(A, B, alpha)
    pristine = logits_of(base.model, batch)

    adapters = Adapters(base, "merged", 0.0)
    adapters.open(Branch(A, alpha))
    adapters.load(factors, {})
    adapted = logits_of(adapters.model, batch)
    adapters.read().save(tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(fresh.model, str(tmp_path / "adapter"))
    assert torch.equal(logits_of(loaded, batch), adapted)
    assert (adapted - pristine).abs().max() > 0.1
    adapters.restore([Factors.load(tmp_path / "adapter")], [])
    merged = logits_of(adapters.model, batch)
    assert (merged - adapted).abs().max() < 1e-5 * adapted.abs().max()
