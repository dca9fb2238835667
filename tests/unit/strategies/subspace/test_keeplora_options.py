"""Options of KeepLoRA by themselves: layer scales, thresholds by layer, presets, and what is refused.

Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA, KeepLoRAOptions
from tests.oracles import subspace

QUICK = settings(max_examples=50, deadline=None)
MODULES = ("self_attn.q_proj", "mlp.down_proj")
PROJECTOR = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
gammas = st.floats(0.01, 0.99)
towers = st.tuples(st.integers(0, 5), st.integers(1, 40))  # first adapted layer, how many


def depths_of(first, count, projector=True):
    depths = {name: None for name in PROJECTOR[: 2 if projector else 0]}
    for depth in range(first, first + count):
        depths.update({f"model.layers.{depth}.{module}": depth for module in MODULES})
    return depths


def scales_of(options, depths):
    """Those of a tower and a projector behind it."""
    towers = {layer: None if depth is None else "language" for layer, depth in depths.items()}
    return options.layer_scales(depths, towers)


def scales(first, count, **options):
    """One scale per transformer layer, in order of depth; every module of a layer and the projector are checked."""
    depths = depths_of(first, count)
    found = scales_of(KeepLoRAOptions(**options), depths)
    assert found.keys() == depths.keys()
    assert [found[name] for name in PROJECTOR] == [1.0, 1.0]
    by_layer = []
    for depth in range(first, first + count):
        values = {found[f"model.layers.{depth}.{module}"] for module in MODULES}
        assert len(values) == 1, "all modules of a layer share one scale"
        by_layer += values
    return by_layer


# -- layer scale -----------------------------------------------------------------------------------------------------


@QUICK
@given(towers, gammas)
def test_linear_scales_rise_strictly_from_gamma_to_one(tower, gamma):
    """[15]"""
    found = scales(*tower, layer_scale="linear", layer_scale_gamma=gamma)
    first, count = tower
    assert len(found) == count and found[-1] == pytest.approx(1.0, rel=1e-12)
    if count > 1:
        assert found[0] == pytest.approx(gamma, rel=1e-12)
        assert all(earlier < later for earlier, later in itertools.pairwise(found))
    expected = [subspace.layer_scale(depth, first, count, gamma) for depth in range(first, first + count)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_linear_scales_of_a_tower_of_32_are_the_stated_ones():
    """Section 4, with the default gamma of 0.2."""
    found = scales(0, 32, layer_scale="linear")
    assert [round(found[depth], 3) for depth in (0, 8, 16, 24, 31)] == [0.2, 0.406, 0.613, 0.819, 1.0]
    assert sum(found) / 32 == pytest.approx(0.6)


@pytest.mark.parametrize("layer_scale", ["linear", "reversed"])
def test_a_single_adapted_layer_is_not_scaled(layer_scale):
    """[15]"""
    assert scales(7, 1, layer_scale=layer_scale, layer_scale_gamma=0.3) == [1.0]


@QUICK
@given(towers, gammas)
def test_reversed_scales_are_the_linear_ones_from_deep_to_shallow(tower, gamma):
    linear, backwards = (scales(*tower, layer_scale=each, layer_scale_gamma=gamma) for each in ("linear", "reversed"))
    assert backwards == pytest.approx(linear[::-1], rel=1e-12)


@pytest.mark.parametrize("layer_scale", ["linear", "reversed"])
def test_gamma_one_is_exactly_no_scale(layer_scale):
    """[15]"""
    assert scales(2, 9, layer_scale=layer_scale, layer_scale_gamma=1.0) == scales(2, 9, layer_scale="none") == [1.0] * 9


def test_one_number_is_the_scale_of_every_transformer_layer():
    assert scales(3, 5, layer_scale=0.6) == [0.6] * 5


def test_a_list_gives_each_transformer_layer_its_own_number():
    given_scales = [0.9, 0.1, 2.0, 0.5]
    assert scales(3, 4, layer_scale=given_scales) == given_scales


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_a_list_of_another_length_than_the_tower_is_refused(length):
    with pytest.raises(UserError, match="layer_scale"):
        scales_of(KeepLoRAOptions(layer_scale=[0.5] * length), depths_of(0, 4))


def test_layers_that_are_not_neighbours_still_rise_from_gamma_to_one():
    """[15]"""
    depths = {f"model.layers.{depth}.mlp.down_proj": depth for depth in (1, 4, 6)}
    found = list(scales_of(KeepLoRAOptions(layer_scale="linear"), depths).values())
    assert found[0] == pytest.approx(0.2) and found[-1] == 1.0 and found[0] < found[1] < found[2]


TOWERS = {"text": (0, 3), "vision": (0, 6)}  # first adapted block, how many


def scales_by_tower(**options):
    """The scales of two towers of unequal depth, in order, and of a projection."""
    depths = {"visual_projection": None}
    for tower, (first, count) in TOWERS.items():
        depths |= {f"{tower}_model.layers.{depth}.{each}": depth for depth in range(first, count) for each in MODULES}
    towers = {layer: layer.partition("_model")[0] if "_model" in layer else None for layer in depths}
    found = KeepLoRAOptions(**options).layer_scales(depths, towers)
    assert found.keys() == depths.keys() and found["visual_projection"] == 1.0
    return {
        tower: [found[layer] for layer in depths if layer.startswith(tower) and "q_proj" in layer] for tower in TOWERS
    }


def ramp(count, gamma=0.2):
    return [pytest.approx(subspace.layer_scale(depth, 0, count, gamma)) for depth in range(count)]


def test_towers_of_unequal_depth_have_a_ramp_each():
    assert scales_by_tower(layer_scale="linear") == {"text": ramp(3), "vision": ramp(6)}
    assert scales_by_tower(layer_scale="reversed") == {"text": ramp(3)[::-1], "vision": ramp(6)[::-1]}


@pytest.mark.parametrize(
    ("layer_scale", "expected"), [("linear", ramp(6)), (0.6, [0.6] * 6), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6],) * 2]
)
def test_a_tower_that_is_not_named_keeps_its_scale_of_one(layer_scale, expected):
    found = scales_by_tower(layer_scale=layer_scale, layer_scale_towers=["vision"])
    assert found == {"text": [1.0] * 3, "vision": expected}


def test_a_list_has_a_number_for_each_layer_of_every_scaled_tower():
    with pytest.raises(UserError, match="lists 6 numbers for 3 adapted layers of text"):
        scales_by_tower(layer_scale=[0.5] * 6)


@pytest.mark.parametrize(
    "bad",
    [0.0, -0.5, float("nan"), float("inf"), "deep", [0.5, 0.0], [1.0, float("nan")], [float("inf"), 1.0]],
    ids=str,
)
def test_a_scale_that_is_no_positive_number_is_refused(bad):
    with pytest.raises(ValidationError, match="layer_scale"):
        KeepLoRAOptions(layer_scale=bad)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1, float("nan")])
def test_a_gamma_outside_zero_to_one_is_refused(gamma):
    with pytest.raises(ValidationError, match="layer_scale_gamma"):
        KeepLoRAOptions(layer_scale_gamma=gamma)


# -- thresholds by layer ---------------------------------------------------------------------------------------------

THRESHOLDS = {
    r".*layers\.0\..*": {"energy_features": 0.5},
    r".*down_proj": {"energy_features": 0.9999, "energy_weights": 0.3},
    r".*": {"energy_anchor": 0.7},
}


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("energy_weights", "model.layers.0.mlp.down_proj", 0.3),  # the first pattern matches but names another energy
        ("energy_features", "model.layers.0.mlp.down_proj", 0.5),
        ("energy_features", "model.layers.10.mlp.down_proj", 0.9999),
        ("energy_features", "model.layers.10.mlp.up_proj", 0.95),
        ("energy_weights", "model.layers.0.mlp.up_proj", 0.6),
        ("energy_anchor", "model.layers.10.mlp.up_proj", 0.7),
    ],
)
def test_the_first_pattern_that_names_an_energy_decides_it(name, layer, expected):
    options = KeepLoRAOptions(thresholds=THRESHOLDS, energy_features=0.95)
    assert options.threshold(name, layer) == expected


def test_patterns_that_match_nothing_are_named():
    layers = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    KeepLoRAOptions(thresholds={r".*up_proj": {"energy_weights": 0.5}}).refuse_idle_patterns(layers)
    KeepLoRAOptions().refuse_idle_patterns(layers)
    idle = KeepLoRAOptions(thresholds={f".*{name}": {"energy_weights": 0.5} for name in ("up_proj", "dwon_proj")})
    with pytest.raises(UserError, match="dwon_proj"):
        idle.refuse_idle_patterns(layers)


@pytest.mark.parametrize(
    ("thresholds", "told"),
    [
        ({"(": {"energy_weights": 0.5}}, r"\("),
        ({".*": {"energy": 0.5}}, "energy_weights"),
        ({".*": {"energy_weights": 1.5}}, r"1\.5"),
        ({".*": {"energy_features": -0.1}}, r"-0\.1"),
        ({".*": {"energy_anchor": float("nan")}}, "nan"),
        ({".*": 0.5}, "thresholds"),
        ({".*": {}}, "names no energy"),
    ],
)
def test_thresholds_that_cannot_be_meant_are_refused(thresholds, told):
    with pytest.raises(ValidationError, match=told):
        KeepLoRAOptions(thresholds=thresholds)


# -- presets ---------------------------------------------------------------------------------------------------------

COMMON = {  # sections 5.1 and 6
    "rank": 64,
    "alpha": 128.0,
    "energy_weights": 0.6,
    "energy_features": 0.99,
    "energy_reference": "total",  # D8
    "grad_samples": 0.2,  # D5
    "feature_samples": 0.2,
    "gradient_statistic": "exact",
    "feature_statistic": "exact",
    "a_init": "gradient",
    "freeze_a": True,
}
OFFICIAL = {
    "rank_rule": "below_legacy",  # D4
    "a_init_svd": "randomized",  # D6: width r, two power iterations
    "oversample": 0,
    "power_iters": 2,
    "b_init": "zero",  # D7
    "basis_dtype": "float16",  # D9
    "feature_source": "post_gradient",  # D2
}
PINNED = {
    "paper": {
        "rank_rule": "reach",
        "weight_side": "input",
        "a_init_svd": "exact",
        "b_init": "gradient",
        "basis_dtype": "float32",
        "feature_source": "activations",
        "layer_scale": "none",
    },
    "official-llava": {**OFFICIAL, "layer_scale": "none"},
    "official-llava-pp": {**OFFICIAL, "layer_scale": "linear", "layer_scale_gamma": 0.2},
}
OURS = {"anchors": (), "thresholds": {}, "feature_tokens": None, "normalise_tokens": False}  # in no published method


@pytest.mark.parametrize("name", sorted(PINNED))
def test_a_published_preset_pins_what_its_source_does(name):
    preset = KeepLoRA.presets[name]
    expected = {**COMMON, **PINNED[name]}
    assert expected.items() <= preset.items()
    options = KeepLoRAOptions(**preset)
    assert {key: getattr(options, key) for key in {**expected, **OURS}} == {**expected, **OURS}


MTIL = {  # clip_mtil 3 and 3.2: the published numbers for CLIP ViT-B/16
    "rank": 16,
    "alpha": 1.0,
    "energy_features": 0.99,
    "energy_reference": "total",
    "grad_samples": 1.0,
    "feature_samples": 1.0,
    "gradient_statistic": "exact",
    "feature_source": "activations",
    "feature_statistic": "exact",
    "a_init": "gradient",
    "freeze_a": True,
    "basis_dtype": "float32",
}
OFFICIAL_MTIL = {
    **MTIL,
    "rank_rule": "below_legacy",
    "weight_side": "output_legacy",
    "a_init_svd": "randomized",
    "oversample": None,  # 4 times the rank: 64 wide
    "power_iters": 4,
    "feature_padding": True,
}
OF_CLIP = {
    "official-mtil": {**OFFICIAL_MTIL, "b_init": "gradient", "layer_scale": "none"},
    "official-mtil-pp": {
        **OFFICIAL_MTIL,
        "b_init": "zero",
        "layer_scale": "linear",
        "layer_scale_gamma": 0.2,
        "layer_scale_towers": ("vision",),
    },
    "mtil": {
        **MTIL,
        "rank_rule": "reach",
        "weight_side": "input",
        "a_init_svd": "exact",
        "b_init": "zero",
        "feature_padding": False,
        "layer_scale": "none",
    },
}


@pytest.mark.parametrize("name", OF_CLIP)
def test_a_preset_of_clip_has_the_published_numbers(name):
    options = KeepLoRAOptions(**KeepLoRA.presets[name])
    assert {key: getattr(options, key) for key in OF_CLIP[name]} == OF_CLIP[name]
    layers = [f"{tower}_model.encoder.layers.0.self_attn.q_proj" for tower in ("vision", "text")]
    assert [options.threshold("energy_weights", layer) for layer in layers] == [0.85, 0.2]


def test_the_published_methods_differ_in_nothing_but_the_layer_scale():
    """Section 5: version 2 of the LLaVA code is assumed equal but for the scale."""
    first, second = (KeepLoRAOptions(**KeepLoRA.presets[name]) for name in ("official-llava", "official-llava-pp"))
    assert first.model_copy(update={"layer_scale": "linear"}) == second


def test_every_preset_builds_valid_options_and_a_benchmark_has_its_ranks():
    """Section 5.1"""
    built = {name: KeepLoRAOptions(**preset) for name, preset in KeepLoRA.presets.items()}
    assert built.keys() == {*PINNED, *OF_CLIP, "mllm_dcl", "ucit"}
    scaling = {name: (options.rank, options.alpha / options.rank) for name, options in built.items()}
    assert scaling["mllm_dcl"] == (64, 2.0) and scaling["ucit"] == (32, 0.25)


# -- defaults and refusals -------------------------------------------------------------------------------------------


def test_defaults_are_those_that_the_comparison_of_code_and_paper_recommends():
    """Section 6, column "default"."""
    options = KeepLoRAOptions()
    assert options.feature_source == "activations"  # D2
    assert options.weight_side == "input"  # D1
    assert options.rank_rule == "reach"  # D4
    assert 512 <= options.grad_samples <= 1024  # D5
    assert options.a_init_svd == "exact"  # D6 says randomized, for its price; the smaller Gram matrix makes exact cheap
    assert options.power_iters == 4 and options.oversample is None
    assert options.b_init == "zero"  # D7
    assert options.energy_reference == "total"  # D8
    assert options.basis_dtype == "float32"  # D9
    assert options.on_exhaustion == "reduce_rank"  # D15
    assert options.layer_scale == "none" and options.layer_scale_gamma == 0.2  # D18
    assert options.layer_scale_towers is None and not options.feature_padding
    assert options.a_init == "gradient" and options.freeze_a
    assert options.anchors == () and options.anchor_samples == 256 and options.energy_anchor == 0.99  # section 14


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("energy_weights", 1.1),
        ("energy_features", -0.1),
        ("energy_anchor", float("nan")),
        ("rank_rule", "below"),
        ("weight_side", "output"),
        ("layer_scale_towers", 3),
        ("energy_reference", "all"),
        ("a_init", "zero"),
        ("a_init_svd", "sketch"),
        ("b_init", "random"),
        ("on_exhaustion", "ignore"),
        ("feature_source", "gradients"),
        ("feature_statistic", "moments"),
        ("feature_tokens", {"picture": 3}),
        ("feature_tokens", {"image": -1}),
        ("feature_sketch_size", 0),
        ("gradient_statistic", "approximate"),
        ("sketch_width", 0),
        ("oversample", -1),
        ("power_iters", -1),
        ("basis_dtype", "float64"),
        ("grad_samples", 0),
        ("feature_samples", -0.2),
        ("anchor_samples", 0),
        ("prototypes", "linear"),
        ("prototype_scale", 0.0),
        ("statistics_memory_gb", 0.0),
        ("freeze_b", True),
    ],
)
def test_values_out_of_range_and_unknown_names_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        KeepLoRAOptions(**{name: value})


def test_padding_is_counted_only_where_it_is_asked_for():
    assert not KeepLoRAOptions().feature_plan().padding
    assert KeepLoRAOptions(feature_padding=True).feature_plan().padding


@pytest.mark.parametrize("name", ["grad_samples", "feature_samples"])
def test_samples_are_whole_records_or_a_share(name):
    for good in (1, 128, 0.2, 1.0):
        assert getattr(KeepLoRAOptions(**{name: good}), name) == good
    with pytest.raises(ValidationError, match="whole number of records"):
        KeepLoRAOptions(**{name: 1.5})


def test_a_sketch_narrower_than_the_rank_is_refused():
    assert KeepLoRAOptions(rank=8, sketch_width=8).gradient_plan().width == 8
    with pytest.raises(ValidationError, match="at least the rank 8"):
        KeepLoRAOptions(rank=8, sketch_width=7)
