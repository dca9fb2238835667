"""Anchors: what general use sends through the layers is kept from the first domain on; against the float64 oracle.

Section 14 of the method; numbers in brackets are those of the invariants.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mllm_keeplora.data.schema import Turn
from tests.oracles import subspace
from tests.support.keeplora import ENERGY_WEIGHTS, TOLERANCE, modules_of
from tests.support.strategies import open_branch
from tests.support.variants import NUM_LAYERS, assert_bases, begin, disturb, pristine_weights
from tests.unit.conftest import captured_tokens, encode


@pytest.fixture
def alpha_records(tiny_records):
    return tiny_records["Alpha"]


@pytest.fixture
def anchor_records(tiny_records):
    """One question each, so that no question follows an answer."""
    return [record for record in tiny_records["Beta"] if len(record.turns) == 2]


def rows_before_answers(base, records):
    """Features by layer from plain hooks over the tokens before the answer, one record at a time."""
    rows = {layer: [] for layer in modules_of(base)}
    for record in records:
        sample = encode(base, [record])
        first = int((sample["labels"][0] != -100).nonzero()[0])
        for layer, features in captured_tokens(base.model, modules_of(base), [sample]).items():
            rows[layer].append(features if "projector" in layer else features[:first])
    return {layer: np.concatenate(parts) for layer, parts in rows.items()}


def expected_anchored(base, records, energy_weights=ENERGY_WEIGHTS, energy=0.8):
    """Section 14 over the tokens before the answer."""
    rows = rows_before_answers(base, records)
    return {
        layer: subspace.grow(subspace.principal_subspace(weight, energy_weights), rows[layer], energy)
        for layer, weight in pristine_weights(base).items()
    }


WITHOUT_ANSWERS = {"feature_tokens": {"answer": 0}, "energy_anchor": 0.8}


@pytest.mark.parametrize(("settings", "picked"), [({}, range(6)), ({"anchor_samples": 4}, (0, 1, 3, 4))], ids=str)
def test_anchors_grow_the_first_basis_by_their_features(new_base, alpha_records, anchor_records, settings, picked):
    """Section 14: Q_0 = grow(W_p, features of the anchor set, energy_anchor)"""
    assert len(anchor_records) == 6
    domain = begin(new_base(), alpha_records, sets={"general": anchor_records}, **WITHOUT_ANSWERS, **settings)
    wanted = expected_anchored(new_base(), [anchor_records[number] for number in picked])
    assert_bases(domain.kept_before, wanted, 1e-3)
    plain = begin(new_base(), alpha_records).kept_before
    assert sum(wanted[layer].shape[1] > plain[layer].shape[1] for layer in plain) > 8
    assert all(np.array_equal(domain.kept_before[layer][:, : kept.shape[1]], kept) for layer, kept in plain.items())


def test_several_anchor_sets_count_as_one(new_base, alpha_records, anchor_records):
    sets = {"first": anchor_records[:2], "second": anchor_records[2:]}
    domain = begin(new_base(), alpha_records, sets=sets, **WITHOUT_ANSWERS)
    assert_bases(domain.kept_before, expected_anchored(new_base(), anchor_records), 1e-3)


def test_anchors_alone_make_the_first_basis_without_weight_protection(new_base, alpha_records, anchor_records):
    sets = {"general": anchor_records}
    domain = begin(new_base(), alpha_records, sets=sets, energy_weights=0.0, **WITHOUT_ANSWERS)
    assert_bases(domain.kept_before, expected_anchored(new_base(), anchor_records, energy_weights=0.0), 1e-3)


def test_answers_of_anchors_are_not_used(new_base, alpha_records, anchor_records):
    """Section 14: the anchor set is unlabelled."""
    other = [replace(r, turns=(r.turns[0], Turn("assistant", "yes no yes"))) for r in anchor_records]
    first, second = (
        begin(new_base(), alpha_records, sets={"general": records}, energy_anchor=0.99).kept_before
        for records in (anchor_records, other)
    )
    for layer, kept in first.items():
        assert kept.shape == second[layer].shape and subspace.projector_difference(kept, second[layer]) < 1e-3


def test_what_anchors_added_is_protected_in_the_first_domain(new_base, alpha_records, anchor_records):
    """[2, 8]"""
    domain = begin(new_base(), alpha_records, sets={"general": anchor_records}, energy_anchor=0.8)
    open_branch(domain.strategy, domain.context)
    disturb(domain.adapters)
    factors = domain.adapters.read()
    assert len(factors.A) == NUM_LAYERS
    for layer, kept in domain.kept_before.items():
        assert np.linalg.norm(factors.A[layer].double().numpy() @ kept, 2) < TOLERANCE
        assert subspace.leak(factors.delta(layer).numpy(), kept) < TOLERANCE


@pytest.mark.parametrize("size", [1, 4])
def test_anchors_reach_their_threshold_from_sketches_too(new_base, alpha_records, anchor_records, size):
    """[5]"""
    settings = {"feature_statistic": "sketch", "feature_sketch_size": size, "energy_anchor": 0.9}
    domain = begin(new_base(), alpha_records, sets={"general": anchor_records}, **settings)
    for layer, rows in rows_before_answers(new_base(), anchor_records).items():
        assert subspace.coverage(domain.kept_before[layer], rows) >= 0.9 - 1e-5


@pytest.mark.parametrize(("energy", "adds"), [(0.0, False), (0.9, True)])
def test_an_anchor_threshold_may_be_named_for_some_layers_alone(new_base, alpha_records, anchor_records, energy, adds):
    thresholds = {".*mlp.*": {"energy_anchor": energy}}
    sets = {"general": anchor_records}
    domain = begin(new_base(), alpha_records, sets=sets, energy_anchor=0.0, thresholds=thresholds)
    plain = begin(new_base(), alpha_records).kept_before
    grown = {layer for layer, kept in domain.kept_before.items() if kept.shape[1] > plain[layer].shape[1]}
    assert bool(grown) == adds and all("mlp" in layer for layer in grown)
