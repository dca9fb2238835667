"""What a KeepLoRA domain leaves behind: the kept basis, grown, and the merged model; against the float64 oracle.

Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.adapters.stored import kept_of, save_growth
from mllm_keeplora.linalg import Basis
from mllm_keeplora.runs import RunDir, Unit
from mllm_keeplora.system.files import write_tensors
from tests.oracles import subspace
from tests.support.keeplora import ALPHA, ENERGY_FEATURES, ENERGY_WEIGHTS, RANK, TOLERANCE, columns_of, layer_scale

# -- the kept basis --------------------------------------------------------------------------------------------------


def test_first_kept_basis_is_the_principal_input_subspace_of_each_weight(taught):
    """[4, 6]"""
    for layer, kept in taught.domains[0].kept_before.items():
        weight = taught.pristine[f"{layer}.weight"].numpy()
        expected = subspace.principal_subspace(weight, ENERGY_WEIGHTS)
        assert 1 <= kept.shape[1] == expected.shape[1] <= min(weight.shape)
        assert subspace.projector_difference(kept, expected) < TOLERANCE
        assert subspace.coverage(kept, weight) >= ENERGY_WEIGHTS
        assert subspace.coverage(kept[:, :-1], weight) < ENERGY_WEIGHTS


def test_kept_bases_are_orthonormal_after_every_growth(taught):
    """[3]"""
    for domain in taught.domains:
        for kept in (*domain.kept_before.values(), *domain.kept_after.values()):
            assert np.linalg.norm(kept.T @ kept - np.eye(kept.shape[1]), 2) < TOLERANCE


def test_kept_bases_come_back_from_disk_bit_for_bit(taught, tmp_path):
    """[3]"""
    units = [Unit(1, "Alpha", ("Alpha",)), Unit(2, "Beta", ("Beta",))]
    run = RunDir(tmp_path)
    first = taught.domains[0].kept_before
    write_tensors(run.kept_by_prepare, {layer: torch.tensor(kept).float() for layer, kept in first.items()})
    for unit, domain in zip(units, taught.domains, strict=True):
        kept = {layer: Basis.from_columns(torch.tensor(after).float()) for layer, after in domain.kept_after.items()}
        save_growth(run.folder(unit), kept, {layer: q.shape[1] for layer, q in domain.kept_before.items()}, {})
    for count, expected in enumerate([first, *(domain.kept_after for domain in taught.domains)]):
        stored = columns_of(kept_of(run, units[:count]))
        assert stored.keys() == expected.keys()
        assert all(np.array_equal(stored[layer], expected[layer]) for layer in expected)


def test_kept_subspaces_only_ever_grow(taught):
    """[4]"""
    first, second = taught.domains
    for layer in taught.adapters.layers:
        bases = [first.kept_before[layer], first.kept_after[layer], second.kept_before[layer], second.kept_after[layer]]
        ranks = [basis.shape[1] for basis in bases]
        assert ranks == sorted(ranks) and ranks[-1] <= bases[0].shape[0]
        assert np.array_equal(bases[1], bases[2])
        for earlier, later in pairwise(bases):
            assert np.array_equal(later[:, : earlier.shape[1]], earlier), "earlier columns stay bit for bit"
    assert sum(first.added.values()) > 0 and sum(second.added.values()) > 0


def test_growth_is_that_of_the_reference_from_all_stacked_tokens(taught):
    """[5], equations (8)-(10)"""
    for domain in taught.domains:
        for layer, kept in domain.kept_after.items():
            before, tokens = domain.kept_before[layer], domain.tokens[layer]
            expected = subspace.grow(before, tokens, ENERGY_FEATURES)
            assert domain.added[layer] == expected.shape[1] - before.shape[1] == kept.shape[1] - before.shape[1]
            assert subspace.projector_difference(kept, expected) < 1e-3


def test_kept_basis_covers_enough_of_the_features_and_no_more_than_needed(taught):
    """[5]"""
    minimal = 0
    for domain in taught.domains:
        for layer, kept in domain.kept_after.items():
            assert subspace.coverage(kept, domain.tokens[layer]) >= ENERGY_FEATURES - 1e-6
            if domain.added[layer]:
                assert subspace.coverage(kept[:, :-1], domain.tokens[layer]) < ENERGY_FEATURES
                minimal += 1
    assert minimal > 16


def test_the_same_features_once_more_add_nothing(taught):
    """[7]"""
    assert taught.added_again == dict.fromkeys(taught.adapters.layers, 0)


# -- merging ---------------------------------------------------------------------------------------------------------


def test_the_restored_model_computes_what_the_adapted_one_did(taught):
    """[11]"""
    for domain in taught.domains:
        size = domain.logits["adapted"].abs().max()
        assert (domain.logits["restored"] - domain.logits["adapted"]).abs().max() < TOLERANCE * size


def test_merged_weights_and_stacked_deltas_are_those_of_the_reference(taught, new_base):
    """[11], equation (7)"""
    base = new_base()
    merged = Adapters(base, "merged", 0.0)
    for count in (1, 2):
        merged.restore([domain.factors for domain in taught.domains[:count]], [])
        for layer in merged.layers:
            scale = ALPHA / RANK * layer_scale(base.parts.depth(layer))
            branches = [domain.factors for domain in taught.domains[:count]]
            stack = [(factors.A[layer].numpy(), factors.B[layer].numpy(), scale) for factors in branches]
            expected = subspace.merge(taught.pristine[f"{layer}.weight"].numpy(), stack)
            assert np.abs(merged.weight(layer).double().numpy() - expected).max() < 1e-6


def test_protected_inputs_pass_the_merged_layer_as_they_did_the_pristine_one(taught, new_base):
    """[8], after both merges"""
    base = new_base()
    merged = Adapters(base, "merged", 0.0)
    merged.restore([domain.factors for domain in taught.domains], [])
    for layer in merged.layers:
        kept = taught.domains[0].kept_before[layer]
        before = taught.pristine[f"{layer}.weight"].double().numpy() @ kept
        after = merged.weight(layer).double().numpy() @ kept
        assert np.linalg.norm(after - before) < TOLERANCE * np.linalg.norm(before)
        assert not torch.allclose(merged.weight(layer), taught.pristine[f"{layer}.weight"], atol=1e-4)
