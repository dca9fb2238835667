"""The memory estimate: what a skeleton's graph saves is what the real model's saves; parts change with the settings."""

import pytest
import torch

from mllm_keeplora.checks.memory import estimate
from mllm_keeplora.config import parse_config
from mllm_keeplora.models.base import skeleton
from mllm_keeplora.models.causal.sizes import sizes_of
from mllm_keeplora.strategies import build_strategy
from tests.support.tiny import tiny_config


def estimated(tiny_folder, base, tokens=40, domains=2, world=1, strategy=None, on_gpu=False, **changes):
    values = tiny_config(tiny_folder, tiny_folder, tiny_folder / "run", **changes)
    values["strategy"] = strategy or values["strategy"]
    config = parse_config(values, origin="test")
    built = build_strategy(config.strategy, "test")
    model = skeleton(str(tiny_folder), torch.float32)
    shape = (tokens, 2, domains, torch.float32, on_gpu, world)
    return estimate(config, built, base.family, model, base.parts, *shape)


def saved_by(decoder, width, tokens):
    weights = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
    found, kept = {}, []

    def pack(tensor):
        kept.append(tensor.untyped_storage())
        if kept[-1]._cdata not in weights:
            found[kept[-1]._cdata] = kept[-1].nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(inputs_embeds=torch.zeros(1, tokens, width, requires_grad=True), use_cache=False)
    return sum(found.values())


def test_a_skeleton_saves_what_the_model_itself_would(base, tiny_folder):
    sizes = sizes_of(skeleton(str(tiny_folder), torch.float32), base.parts, torch.float32, tokens=32)
    decoder = base.model.get_submodule(base.parts.language_model)
    assert 32 * sizes.saved == pytest.approx(saved_by(decoder, 32, 32), rel=0.1)
    assert sizes.blocks == 2
    assert sorted(sizes.input_widths) == [32] * 8 + [48] * 2  # q k v share one, gate and up one; two of projector


def test_what_grows_with_what(base, tiny_folder):
    whole = estimated(tiny_folder, base)
    longer = estimated(tiny_folder, base, tokens=80)
    assert longer.stages["train"]["graph"] > 1.7 * whole.stages["train"]["graph"]
    assert (
        longer.stages["train"]["weights"]
        == whole.stages["train"]["weights"]
        == 4 * sum(parameter.numel() for parameter in base.model.parameters())
    )
    factors = estimated(tiny_folder, base, adapters={"history": "factors"})
    both = sum(sum(base.model.get_submodule(name).weight.shape) for name in base.parts.target_layers)
    assert factors.stages["train"]["past domains"] == 4 * 4 * 2 * both
    checkpointed = estimated(tiny_folder, base, train={"gradient_checkpointing": True})
    assert checkpointed.stages["train"]["graph"] < whole.stages["train"]["graph"]


def test_zero_divides_what_it_divides(base, tiny_folder):
    pytest.importorskip("deepspeed")
    one, two, three, away = (
        estimated(tiny_folder, base, world=2, deepspeed=name) for name in ("zero1", "zero2", "zero3", "zero3_offload")
    )
    states = [each.stages["train"]["branch and optimizer"] for each in (one, two, three, away)]
    assert states == sorted(states, reverse=True)
    assert 2 * three.stages["train"]["weights"] == two.stages["train"]["weights"]
    assert one.host == 0.0 and away.host > one.stages["train"]["weights"]


def test_gradients_that_are_summed_exactly_take_their_full_size(base, tiny_folder):
    layers = [base.model.get_submodule(name) for name in base.parts.target_layers]
    full = 4 * sum(m.weight.numel() for m in layers)
    shape = {"name": "keeplora", "rank": 2, "alpha": 4}
    sketched = estimated(tiny_folder, base, strategy=shape).stages["gradient"]["gradient sums"]
    for options in ({"gradient_statistic": "exact"}, {"b_init": "gradient"}):
        assert estimated(tiny_folder, base, strategy={**shape, **options}).stages["gradient"]["gradient sums"] == full
    assert 0 < sketched < full
    again = {**shape, "gradient_statistic": "exact", "feature_source": "post_gradient"}
    assert estimated(tiny_folder, base, strategy=again).stages["consolidate"]["gradient sums"] == full


def test_gradients_of_records_by_themselves_are_counted(base, tiny_folder):
    """A-GEM's reference beside its training, EWC's squared ones behind it."""
    plain, reference, squared = (
        estimated(
            tiny_folder,
            base,
            strategy={"name": name, "rank": 4, "alpha": 8},
            train={"micro_batch_size": 1, "probe_batch_size": 8},
        ).stages
        for name in ("replay", "agem", "ewc")
    )
    assert reference["train"]["graph"] > 7 * plain["train"]["graph"]
    layers = [base.model.get_submodule(name) for name in base.parts.target_layers]
    assert squared["consolidate"]["Fisher information"] == 12 * 4 * sum(sum(m.weight.shape) for m in layers)
    assert squared["consolidate"]["graph"] == squared["train"]["graph"] > 0, "of one record, through the branch"
    assert plain["consolidate"] == reference["consolidate"] and "graph" not in plain["consolidate"]


def test_stages_and_past_are_those_of_the_strategy(base, tiny_folder):
    ours = estimated(tiny_folder, base)
    plain, routed, projected, projected_start = (
        estimated(tiny_folder, base, domains=9, strategy={"name": name, "rank": 4, "alpha": 8})
        for name in ("finetune", "routed", "gpm", "inflora")
    )
    assert list(ours.stages) == ["prepare", "gradient", "train", "consolidate", "evaluate"]
    assert list(plain.stages) == ["gradient", "train", "evaluate"]
    assert list(routed.stages) == ["gradient", "train", "consolidate", "evaluate"]
    assert list(projected.stages) == list(projected_start.stages) == list(ours.stages)
    assert plain.stages["gradient"].keys() == {"weights", "past domains"}, "a branch is begun, and nothing looked at"
    layers = [base.model.get_submodule(name) for name in base.parts.target_layers]
    into, out = 4 * sum(m.in_features for m in layers), 4 * sum(m.out_features for m in layers)
    assert ours.stages["train"]["branch and optimizer"] == 16 * out + 4 * into
    assert projected_start.stages["train"]["branch and optimizer"] == 16 * out + 4 * into, "its A is frozen, too"
    assert plain.stages["train"]["branch and optimizer"] == 16 * (out + into)
    assert plain.stages["train"]["past domains"] == 4 * sum(m.weight.numel() for m in layers)
    assert routed.stages["train"]["past domains"] == 4 * 9 * (into + out)
    assert "kept bases" not in plain.stages["train"] and projected.stages["train"]["kept bases"] > 0


def test_kept_bases_are_on_the_host_beside_a_gpu_but_where_the_training_needs_them(base, tiny_folder):
    ours, projected = (
        estimated(tiny_folder, base, strategy={"name": name, "rank": 4, "alpha": 8}, on_gpu=True)
        for name in ("keeplora", "gpm")
    )
    kept = ours.host
    assert kept == 2 * sum(base.model.get_submodule(name).in_features ** 2 for name in base.parts.target_layers)
    assert "kept bases" not in ours.stages["train"]
    assert projected.host == projected.stages["train"]["kept bases"] == kept
    assert "kept bases" not in projected.stages["consolidate"]
