"""What KeepLoRA keeps under every option: first bases, growth and switches; against the float64 oracle.

Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import Basis
from mllm_keeplora.models.causal.parts import name_parts
from tests.oracles import subspace, tokens
from tests.support.keeplora import ENERGY_FEATURES, ENERGY_WEIGHTS, RANK, SAMPLES, TOLERANCE
from tests.support.variants import assert_bases, begin, disturb, opened, pristine_weights


@pytest.fixture
def alpha_records(tiny_records):
    return tiny_records["Alpha"]


def taught(base, records, **settings):
    """A domain up to the end of its training, which is made up."""
    domain = opened(base, records, **settings)
    disturb(domain.adapters)
    return domain


# -- first bases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.05, 0.4, 0.9])
def test_the_legacy_rule_takes_one_direction_fewer_but_at_least_one(new_base, alpha_records, energy):
    """[18], option D4"""
    base = new_base()
    reach = begin(new_base(), alpha_records, energy_weights=energy).kept_before
    found = begin(base, alpha_records, energy_weights=energy, rank_rule="below_legacy").kept_before
    for layer, columns in found.items():
        assert columns.shape[1] == max(reach[layer].shape[1] - 1, 1)
    wanted = {
        layer: subspace.principal_subspace(weight, energy, legacy=True)
        for layer, weight in pristine_weights(base).items()
    }
    assert_bases(found, wanted)


@pytest.fixture
def square_base(new_base):
    """The base with adapters in its attention alone, whose weights are square."""
    base = new_base("frozen")
    return dataclasses.replace(base, parts=name_parts(base.model, "frozen", [*QKV, "o_proj"]))


@pytest.mark.parametrize("energy", [0.2, 0.85])
def test_the_legacy_side_keeps_output_directions_of_weights_as_if_they_were_of_the_input(
    square_base, alpha_records, energy
):
    """Option D1: as many directions as on the input side; A avoids them, and features are added outside of them."""
    legacy = {"energy_weights": energy, "rank_rule": "below_legacy", "weight_side": "output_legacy"}
    weights = pristine_weights(square_base)
    domain = taught(square_base, alpha_records, **legacy)
    assert len(domain.kept_before) == 8
    features, after = domain.tokens(), domain.finish()
    for layer, columns in domain.kept_before.items():
        assert columns.shape == subspace.principal_subspace(weights[layer], energy, legacy=True).shape
        wanted = subspace.output_subspace_legacy(weights[layer], energy)
        assert subspace.projector_difference(columns, wanted) < TOLERANCE, layer
        assert subspace.projector_difference(columns, subspace.principal_subspace(weights[layer], energy)) > 0.1
        assert np.abs(domain.adapters.branch.A[layer].numpy() @ columns).max() < TOLERANCE
        grown = subspace.grow(columns, features[layer], ENERGY_FEATURES)
        assert after[layer].shape == grown.shape and subspace.projector_difference(after[layer], grown) < 1e-3


def test_the_legacy_side_keeps_nothing_where_no_energy_is_asked_for(square_base, alpha_records):
    kept = begin(square_base, alpha_records, energy_weights=0.0, weight_side="output_legacy").kept_before
    assert {columns.shape for columns in kept.values()} == {(32, 0)}


def test_options_that_the_bases_layers_do_not_allow_are_refused_all_at_once(base, alpha_records):
    wrong = {"weight_side": "output_legacy", "feature_padding": True, "layer_scale_towers": ("vision", "text")}
    with pytest.raises(UserError) as refused:
        begin(base, alpha_records, **wrong)
    side, towers, padding = refused.value.sentences
    assert side.startswith("strategy.weight_side is output_legacy, but 6 of 16 layers are not square, first model.")
    assert side.endswith("mlp.gate_proj (48 x 32); allowed: input, or square layers alone in adapters.target")
    assert towers == "strategy.layer_scale_towers: the base has no vision, text; it has language"
    assert padding == "strategy.feature_padding is true, but the base has no text tower that pads; allowed: false"


def test_the_legacy_rule_is_about_weights_alone(new_base, alpha_records):
    """Option D4: growth reaches its threshold all the same."""
    domain = taught(new_base(), alpha_records, rank_rule="below_legacy")
    features = domain.tokens()
    wanted = {
        layer: subspace.grow(kept, features[layer], ENERGY_FEATURES) for layer, kept in domain.kept_before.items()
    }
    assert_bases(domain.finish(), wanted, 1e-3)


def test_layers_with_one_input_keep_what_any_of_them_keeps(new_base, alpha_records):
    """Option D14: the span of q, k, v together, grown by the same features; other layers keep their own."""
    own = begin(new_base(), alpha_records).kept_before
    domain = taught(new_base(), alpha_records, share_basis="input")
    features, after = domain.tokens(), domain.finish()
    for layer, columns in own.items():
        block, _, name = layer.rpartition(".")
        names = next((names for names in (QKV, ("gate_proj", "up_proj")) if name in names), (name,))
        together = np.concatenate([own[f"{block}.{each}"] for each in names], axis=1)
        left, values, _ = np.linalg.svd(together, full_matrices=False)
        united = left[:, values > 1e-5]
        found = domain.kept_before[layer]
        assert found.shape == united.shape and (len(names) == 1 or found.shape[1] > columns.shape[1])
        assert np.linalg.norm(found @ found.T - united @ united.T, 2) < TOLERANCE, layer
        assert np.array_equal(after[layer], after[f"{block}.{names[0]}"])
    kept = domain.kept_before
    assert_bases(after, {layer: subspace.grow(kept[layer], features[layer], ENERGY_FEATURES) for layer in kept}, 1e-3)


QKV = ("q_proj", "k_proj", "v_proj")
THRESHOLDS = {
    r".*down_proj.*": {"energy_weights": 0.8, "energy_features": 0.99},
    r".*layers\.1.*": {"energy_features": 0.6},
    r".*multi_modal_projector.*": {"energy_weights": 0.1, "energy_features": 0.0},
}


def threshold(name, layer):
    """The same once more, by hand."""
    own = {"energy_weights": ENERGY_WEIGHTS, "energy_features": ENERGY_FEATURES}
    if "layers.1" in layer:
        own["energy_features"] = 0.6
    if "down_proj" in layer:
        own = {"energy_weights": 0.8, "energy_features": 0.99}
    if "projector" in layer:
        own = {"energy_weights": 0.1, "energy_features": 0.0}
    return own[name]


def test_layers_that_a_pattern_names_get_thresholds_of_their_own(new_base, alpha_records):
    """Section 9"""
    base = new_base()
    pristine = pristine_weights(base)
    domain = taught(base, alpha_records, thresholds=THRESHOLDS)
    wanted = {
        layer: subspace.principal_subspace(weight, threshold("energy_weights", layer))
        for layer, weight in pristine.items()
    }
    assert_bases(domain.kept_before, wanted)
    features, grown = domain.tokens(), {}
    for layer, kept in domain.kept_before.items():
        grown[layer] = subspace.grow(kept, features[layer], threshold("energy_features", layer))
    assert_bases(domain.finish(), grown, 1e-3)


def test_a_pattern_that_matches_no_layer_stops_the_run_before_anything_is_learnt(base, alpha_records):
    with pytest.raises(UserError, match="dwon_proj"):
        begin(base, alpha_records, thresholds={".*dwon_proj": {"energy_features": 0.99}})


# -- switches --------------------------------------------------------------------------------------------------------


def test_without_weight_protection_the_first_basis_is_empty_and_a_is_that_of_the_whole_gradient(
    new_base, alpha_records
):
    """Ablation: energy_weights = 0"""
    gradients = begin(new_base(), alpha_records).gradients()
    domain = opened(new_base(), alpha_records, energy_weights=0.0)
    for layer, gradient in gradients.items():
        assert domain.kept_before[layer].shape == (gradient.shape[1], 0)
        wanted = subspace.initial_a(gradient, subspace.empty_basis(gradient.shape[1]), RANK)
        assert subspace.projector_difference(domain.adapters.branch.A[layer].numpy().T, wanted.T) < 1e-3
    disturb(domain.adapters)
    features, grown = domain.tokens(), domain.finish()
    assert_bases(
        grown, {layer: subspace.grow(domain.kept_before[layer], features[layer], 0.9) for layer in grown}, 1e-3
    )


@pytest.mark.parametrize("source", ["activations", "post_gradient"])
@pytest.mark.parametrize("reference", ["total", "residual"])
def test_without_feature_protection_no_basis_grows(base, alpha_records, source, reference):
    """Ablation: energy_features = 0"""
    settings = {"energy_features": 0.0, "feature_source": source, "energy_reference": reference}
    domain = taught(base, alpha_records, **settings)
    after = domain.finish()
    assert all(np.array_equal(after[layer], kept) for layer, kept in domain.kept_before.items())


# -- growth ----------------------------------------------------------------------------------------------------------


def test_a_share_of_the_residual_adds_more_than_one_of_the_total(new_base, alpha_records):
    """Option D8"""
    grown = {}
    for reference in ("total", "residual"):
        domain = taught(new_base(), alpha_records, energy_reference=reference)
        features, grown[reference] = domain.tokens(), domain.finish()
        wanted = {
            layer: subspace.grow(kept, features[layer], ENERGY_FEATURES, reference=reference)
            for layer, kept in domain.kept_before.items()
        }
        assert_bases(grown[reference], wanted, 1e-3)
    sizes = {name: [columns.shape[1] for columns in bases.values()] for name, bases in grown.items()}
    pairs = list(zip(sizes["total"], sizes["residual"], strict=True))
    assert all(total <= residual for total, residual in pairs) and sum(a < b for a, b in pairs) > 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"energy_reference": "residual"},
        {"gradient_statistic": "sketch", "sketch_width": 8},
        {"gradient_statistic": "auto", "statistics_memory_gb": 1e-9, "sketch_width": 8},
        {"feature_statistic": "sketch", "feature_sketch_size": 4},
        {"b_init": "gradient", "layer_scale": "linear"},
        {"history": "factors"},
    ],
    ids=str,
)
def test_bases_grow_by_the_mean_gradient_after_training_where_that_is_asked_for(new_base, alpha_records, settings):
    """Option D2: the rows are those of the mean weight gradient at the trained weights, whatever the statistic."""
    domain = taught(new_base(), alpha_records, feature_source="post_gradient", **settings)
    gradients, reference = domain.gradients(), settings.get("energy_reference", "total")
    wanted = {
        layer: subspace.grow(kept, gradients[layer], ENERGY_FEATURES, reference=reference)
        for layer, kept in domain.kept_before.items()
    }
    assert sum(wanted[layer].shape[1] > kept.shape[1] for layer, kept in domain.kept_before.items()) > 8
    assert_bases(domain.finish(), wanted, 1e-3)


def test_the_gradient_after_training_is_averaged_over_the_samples_for_features(new_base, alpha_records):
    """Option D2: `feature_samples` counts, not `grad_samples`."""
    domain = taught(new_base(), alpha_records, feature_source="post_gradient", grad_samples=1, feature_samples=SAMPLES)
    gradients = domain.gradients()
    kept = domain.kept_before
    assert_bases(domain.finish(), {layer: subspace.grow(kept[layer], gradients[layer], 0.9) for layer in kept}, 1e-3)


@pytest.mark.parametrize("reference", ["total", "residual"])
@pytest.mark.parametrize(("statistic", "size"), [("sketch", 1), ("sketch", 4), ("auto", 12)])
def test_growth_from_sketches_reaches_the_threshold_on_all_tokens(new_base, alpha_records, reference, size, statistic):
    """[5] however small the sketch"""
    settings = {"feature_statistic": statistic, "feature_sketch_size": size, "statistics_memory_gb": 1e-9}
    domain = taught(new_base(), alpha_records, energy_reference=reference, **settings)
    features, grown = domain.tokens(), domain.finish()
    for layer, kept in domain.kept_before.items():
        rows = features[layer]
        if reference == "residual":
            rows = subspace.residual_features(rows, kept)
        assert subspace.coverage(grown[layer], rows) >= ENERGY_FEATURES - 1e-5
        assert np.array_equal(grown[layer][:, : kept.shape[1]], kept)


def rows_by_kind(domain, kind):
    """Features of one kind of token; projector layers see the picture's alone."""
    image_token, features = domain.base.model.config.image_token_id, domain.tokens()
    lists = [
        [sample[key][0].tolist() for sample in domain.samples] for key in ("input_ids", "labels", "attention_mask")
    ]
    lengths = np.cumsum([0, *(len(row) for row in lists[0])])
    places = [
        start + place
        for start, of in zip(lengths, tokens.positions_by_kind(*lists, image_token), strict=False)
        for place in of[kind]
    ]
    assert len(places) > SAMPLES
    none = 0 if kind != tokens.IMAGE else None
    return {layer: rows[:none] if "projector" in layer else rows[places] for layer, rows in features.items()}


@pytest.mark.parametrize("kind", [tokens.IMAGE, tokens.ANSWER])
def test_growth_sees_only_the_tokens_that_have_a_budget(new_base, alpha_records, kind):
    budgets = {other: 0 for other in (tokens.IMAGE, tokens.INSTRUCTION, tokens.ANSWER) if other != kind}
    domain = taught(new_base(), alpha_records, feature_tokens=budgets)
    rows, kept = rows_by_kind(domain, kind), domain.kept_before
    wanted = {
        layer: subspace.grow(kept[layer], rows[layer], ENERGY_FEATURES) if len(rows[layer]) else kept[layer]
        for layer in kept
    }
    assert_bases(domain.finish(), wanted, 1e-3)


def test_normalised_growth_is_that_of_every_token_over_its_length(new_base, alpha_records):
    """Section 9, massive activations"""
    domain = taught(new_base(), alpha_records, normalise_tokens=True)
    rows = {layer: x / np.linalg.norm(x, axis=1, keepdims=True) for layer, x in domain.tokens().items()}
    kept = domain.kept_before
    wanted = {layer: subspace.grow(kept[layer], rows[layer], ENERGY_FEATURES) for layer in kept}
    assert_bases(domain.finish(), wanted, 1e-3)


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_bases_are_what_their_file_holds_and_orthonormal_when_read(new_base, alpha_records, dtype):
    """[2, 3], option D9"""
    exact = begin(new_base(), alpha_records).kept_before
    domain = taught(new_base(), alpha_records, basis_dtype=str(dtype).removeprefix("torch."))
    after = domain.finish()
    for layer, columns in after.items():
        A, kept = domain.adapters.branch.A[layer], domain.kept_before[layer]
        assert torch.equal(A, A.to(dtype).float())
        assert np.linalg.norm(A.double().numpy() @ kept, 2) < 5e-3 * (8 if dtype == torch.bfloat16 else 1)
        for stored in (kept, columns):
            assert np.array_equal(torch.tensor(stored).to(dtype).double().numpy(), stored)
        assert np.array_equal(columns[:, : kept.shape[1]], kept)
        assert subspace.projector_difference(kept, exact[layer]) < 2e-2
        read = Basis.from_columns(torch.tensor(columns).to(dtype)).columns.double().numpy()
        assert np.linalg.norm(read.T @ read - np.eye(read.shape[1])) < TOLERANCE
