"""Passes over data: what they collect, against plain hooks and plain autograd; and that they leave nothing behind."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mllm_keeplora.adapters import Adapters, Branch, adapters_for
from mllm_keeplora.models.causal.losses import supervised_logits
from mllm_keeplora.models.family import mean_by_row
from mllm_keeplora.probes.features import collect_moments
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.strategies.baselines.ewc import EWCOptions
from mllm_keeplora.training.trainer import answer_loss
from tests.support.strategies import context_of
from tests.unit.conftest import autograd_mean_gradients, captured_tokens, encode

TOLERANCE = 1e-5  # of the largest entry


def modules_of(base):
    return {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}


def weights_of(base):
    return {layer: module.weight for layer, module in modules_of(base).items()}


def one_by_one(base, records):
    return [encode(base, [record]) for record in records]


def assert_close(found, expected):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found, dtype=np.float64) - expected).max() <= TOLERANCE * np.abs(expected).max()


def state_of(model):
    """Everything that a pass might leave behind: modes, trainability, gradients, hooks (not those of transformers)."""
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    hooks = [
        f"{name}: {hook.__qualname__}"
        for name, module in model.named_modules()
        for kind in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
        for hook in kind.values()
        if not hook.__module__.startswith("transformers.")
    ]
    return modes, trained, gradients, hooks


def with_open_branch(base, train=("B",)):
    """Adapters with a random branch on every target layer, whose B is not zero."""
    adapters = Adapters(base, "merged", 0.0)
    generator = torch.Generator().manual_seed(5)
    A = {layer: torch.randn(2, w.shape[1], generator=generator) for layer, w in weights_of(base).items()}
    adapters.open(Branch(A, dict.fromkeys(A, 2.0), train=train))
    for name, parameter in adapters.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return adapters


# -- moments ---------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_real_tokens_seen_by_a_plain_hook(base, tiny_records):
    records = tiny_records["Alpha"][:5]
    tokens = captured_tokens(base.model, modules_of(base), one_by_one(base, records))
    batches = [encode(base, records[:3]), encode(base, records[3:])]
    moments = collect_moments(base.family, base.model, modules_of(base), batches)
    assert list(moments) == list(base.parts.target_layers) and len(moments) == 16
    for layer, accumulator in moments.items():
        assert_close(accumulator.moments, tokens[layer].T @ tokens[layer])
        assert accumulator.count == len(tokens[layer])
        assert accumulator.total_energy == pytest.approx((tokens[layer] ** 2).sum(), rel=1e-5)


def test_padding_never_counts_in_a_batch_of_unequal_lengths(base, tiny_records):
    records = tiny_records["Alpha"][:4]
    together = encode(base, records)
    assert not bool(together["attention_mask"].all()), "the records must differ in length"
    batch = collect_moments(base.family, base.model, modules_of(base), [together])
    single = [collect_moments(base.family, base.model, modules_of(base), [each]) for each in one_by_one(base, records)]
    for layer in base.parts.target_layers:
        assert batch[layer].count == sum(each[layer].count for each in single)
        assert_close(batch[layer].moments, sum(each[layer].moments.double() for each in single))


def test_padding_never_counts_whatever_token_and_side_it_has(base, tiny_records):
    records = tiny_records["Alpha"][:2]
    right = encode(base, records)
    left = {key: value.clone() for key, value in right.items()}
    for row, length in enumerate(right["attention_mask"].sum(1).tolist()):
        for key, fill in (("input_ids", 20), ("attention_mask", 0)):
            left[key][row] = fill
            left[key][row, -length:] = right[key][row, :length]
    tokens = captured_tokens(base.model, modules_of(base), one_by_one(base, records))
    moments = collect_moments(base.family, base.model, modules_of(base), [left])
    for layer in base.parts.target_layers:
        assert_close(moments[layer].moments, tokens[layer].T @ tokens[layer])


def test_layers_that_are_fed_the_same_tensor_share_one_accumulator_and_no_others_do(base, tiny_records):
    batches = [encode(base, tiny_records["Alpha"][:2]), encode(base, tiny_records["Alpha"][2:4])]
    moments = collect_moments(base.family, base.model, modules_of(base), batches)
    for number in range(2):
        layer = f"model.language_model.layers.{number}"
        q, k, v = (moments[f"{layer}.self_attn.{part}_proj"] for part in "qkv")
        gate, up = moments[f"{layer}.mlp.gate_proj"], moments[f"{layer}.mlp.up_proj"]
        assert q is k and k is v and gate is up and q is not gate
    assert len({id(accumulator) for accumulator in moments.values()}) == 2 * 4 + 2


def test_moments_of_adapted_layers_are_those_of_the_adapted_model(base, tiny_records):
    records = tiny_records["Beta"][:3]
    plain = collect_moments(base.family, base.model, modules_of(base), [encode(base, records)])
    adapters = with_open_branch(base)
    tokens = captured_tokens(adapters.model, modules_of(base), one_by_one(base, records))
    moments = collect_moments(base.family, adapters.model, modules_of(base), [encode(base, records)])
    for layer in base.parts.target_layers:
        assert_close(moments[layer].moments, tokens[layer].T @ tokens[layer])
    moved = [layer for layer in moments if not torch.allclose(moments[layer].moments, plain[layer].moments, rtol=1e-3)]
    assert len(moved) == 15, "the branch must change what every layer but the very first is fed"


# -- mean gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_mean_gradients_are_the_average_of_single_sample_autograd_gradients(base, tiny_records, sizes):
    records = tiny_records["Alpha"][:5]
    expected = autograd_mean_gradients(base.model, weights_of(base), one_by_one(base, records))
    parts = np.split(np.arange(5), np.cumsum(sizes)[:-1])
    batches = [encode(base, [records[i] for i in part]) for part in parts]
    gradients = collect_mean_gradients(base.family, base.model, modules_of(base), batches)
    assert list(gradients) == list(base.parts.target_layers)
    for layer, accumulator in gradients.items():
        assert accumulator.count == 5
        assert np.abs(expected[layer]).max() > 1e-6
        assert_close(accumulator.mean, expected[layer])


@pytest.mark.parametrize("history", ["merged", "factors"])
def test_mean_gradients_after_a_learnt_domain_are_those_at_the_merged_weights(new_base, tiny_records, history):
    taught, base = new_base(), new_base()
    factors = with_open_branch(taught).read()
    for layer, weight in weights_of(base).items():
        weight.data.add_(factors.delta(layer))
    expected = autograd_mean_gradients(base.model, weights_of(base), one_by_one(base, tiny_records["Beta"][:3]))

    again = new_base()
    adapters = Adapters(again, history, 0.0)
    adapters.restore([factors], [])
    batch = encode(again, tiny_records["Beta"][:3])
    gradients = collect_mean_gradients(base.family, adapters.model, modules_of(again), [batch])
    for layer, accumulator in gradients.items():
        assert_close(accumulator.mean, expected[layer])


def test_loss_of_a_sample_is_the_mean_over_its_answer_tokens(base, tiny_records):
    records = tiny_records["Alpha"][:4]
    batch = encode(base, records)
    with torch.no_grad():
        together = mean_by_row(*base.family.losses(base.model(**batch).logits, batch["labels"]), len(batch["labels"]))
        alone = [base.model(**each).loss for each in one_by_one(base, records)]
    assert together.dtype == torch.float32
    assert torch.allclose(together, torch.stack(alone), rtol=1e-5)


def test_logits_of_supervised_positions_alone_give_the_models_own_loss_and_gradients(base, tiny_records):
    batch = encode(base, tiny_records["Alpha"][:4])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    weight = base.model.get_submodule(base.parts.target_layers[0]).weight.requires_grad_(True)
    whole = base.model(**batch)
    [expected] = torch.autograd.grad(whole.loss, [weight])
    with supervised_logits(base.model, batch):
        outputs = base.model(**inputs)
    tokens = int((batch["labels"] != -100).sum())
    assert outputs.logits.shape[:2] == (1, tokens) and whole.logits.shape[:2] == batch["labels"].shape
    loss = answer_loss(base.family, outputs, batch["labels"], num_items_in_batch=2 * tokens)
    [found] = torch.autograd.grad(loss, [weight])
    assert torch.allclose(2 * loss, whole.loss) and torch.allclose(
        answer_loss(base.family, outputs, batch["labels"]), whole.loss
    )
    assert_close(2 * found, expected)
    assert base.model(**inputs).logits.shape[:2] == batch["labels"].shape  # nothing is left behind


def test_no_base_parameter_ever_requires_or_receives_a_gradient(base, tiny_records):
    required = []

    def look(module, args):
        required.extend(parameter.requires_grad for parameter in base.model.parameters())

    handle = base.model.register_forward_pre_hook(look)
    collect_mean_gradients(base.family, base.model, modules_of(base), [encode(base, tiny_records["Alpha"][:2])])
    handle.remove()
    assert len(required) > 50 and not any(required)
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_no_parameter_of_an_open_branch_receives_a_gradient(base, tiny_records):
    adapters = with_open_branch(base, train=("A", "B"))
    before = state_of(adapters.model)
    assert sum(before[1].values()) == 32
    collect_mean_gradients(base.family, adapters.model, modules_of(base), [encode(base, tiny_records["Alpha"][:2])])
    assert state_of(adapters.model)[1:] == before[1:]


# -- nothing is left behind, faults are named ------------------------------------------------------------------------


class Trouble(RuntimeError):
    pass


@pytest.mark.parametrize("collect", [collect_moments, collect_mean_gradients])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_hooks_mode_and_trainability_are_restored_also_when_the_forward_raises(
    base, tiny_records, collect, training, fails
):
    adapters = with_open_branch(base)
    adapters.model.train(training)
    before = state_of(adapters.model)
    batches = [encode(base, tiny_records["Alpha"][:2])]
    if fails:

        def fail(module, args, output):
            raise Trouble

        handle = base.model.get_submodule("model.language_model.layers.1").register_forward_hook(fail)
        with pytest.raises(Trouble):
            collect(base.family, adapters.model, modules_of(base), batches)
        handle.remove()
    else:
        collect(base.family, adapters.model, modules_of(base), batches)
    assert state_of(adapters.model) == before


@pytest.mark.parametrize("collect", [collect_moments, collect_mean_gradients])
def test_a_pass_runs_in_evaluation_mode(base, tiny_records, collect):
    modes = []
    handle = base.model.get_submodule("model.language_model").register_forward_pre_hook(
        lambda module, args: modes.append(module.training)
    )
    base.model.train()
    collect(base.family, base.model, modules_of(base), [encode(base, tiny_records["Alpha"][:2])])
    handle.remove()
    assert modes == [False]


@pytest.mark.parametrize("collect", [collect_moments, collect_mean_gradients])
def test_a_weight_that_is_not_a_number_gives_an_error_that_names_a_layer(base, tiny_records, collect):
    broken = "model.language_model.layers.0.mlp.up_proj"
    base.model.get_submodule(broken).weight.data[3, 4] = float("nan")
    before = state_of(base.model)
    with pytest.raises(
        ValueError, match=r"layer model\.language_model\.layers\.\d\.(self_attn|mlp)\.\w+_proj: .*finite"
    ):
        collect(base.family, base.model, modules_of(base), [encode(base, tiny_records["Alpha"][:2])])
    assert state_of(base.model) == before


def test_moments_name_the_first_layer_whose_input_is_not_a_number(base, tiny_records):
    base.model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"^layer model\.language_model\.layers\.0\.mlp\.down_proj: "):
        collect_moments(base.family, base.model, modules_of(base), [encode(base, tiny_records["Alpha"][:2])])


@pytest.mark.parametrize("collect", [collect_moments, collect_mean_gradients])
def test_a_layer_that_takes_no_part_is_an_error(base, tiny_records, collect):
    layers = {**modules_of(base), "idle": torch.nn.Linear(3, 3)}
    with pytest.raises(RuntimeError, match=r"1 target layers .* idle"):
        collect(base.family, base.model, layers, [encode(base, tiny_records["Alpha"][:2])])


def test_every_part_of_the_model_gets_its_own_mode_back(base, tiny_records):
    base.model.train()
    base.model.get_submodule("model.vision_tower").eval()
    before = state_of(base.model)
    collect_moments(base.family, base.model, modules_of(base), [encode(base, tiny_records["Alpha"][:2])])
    assert state_of(base.model) == before
    base.model.eval()


@pytest.mark.parametrize(("samples", "looked_at"), [(1, 1), (3, 3), (3.0, 3), (0.5, 4), (1.0, 8), (99, 8)])
def test_samples_are_a_count_of_records_or_a_share_of_them(base, tiny_records, samples, looked_at):
    context = context_of(base, adapters_for(base, "keeplora", "auto"), {"Alpha": tiny_records["Alpha"][:8]}, 0)
    assert len(context.passes.question_features(samples)) == looked_at


def test_a_share_has_a_limit_and_so_do_fractions_of_a_record():
    assert [EWCOptions(samples=each).samples for each in (1, 1.0, 0.2, 512)] == [1, 1.0, 0.2, 512]
    for wrong in (0, 1.5, -3):
        with pytest.raises(ValidationError, match="samples"):
            EWCOptions(samples=wrong)
