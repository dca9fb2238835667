"""GPM-LoRA: A stays outside of what past domains send into a layer, whatever the optimiser does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import Basis, leak
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.strategies.subspace.gpm import GPM, GPMOptions
from tests.oracles import gpm as oracle
from tests.oracles import subspace
from tests.support.bases import gram_error
from tests.support.keeplora import CHOSEN, columns_of, modules_of
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.conftest import captured_tokens, encode

RANK, SAMPLES = 4, 8
SGD = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "batch_size": 12, "args": {"optim": "sgd"}}


def options_of(**changes) -> GPMOptions:
    return GPMOptions(**{"rank": RANK, "alpha": 8.0, "energy": 0.8, "feature_samples": SAMPLES, **changes})


class Watched(GPM):
    """Notes after every step how much of A lies in the memory, and A before and after what it does to A or G."""

    def __init__(self, options):
        super().__init__(options)
        self.inside, self.steps = [], []

    def around_step(self, context, phase, step):
        before = {name: (p.detach().clone(), p.grad.clone()) for name, p in context.branches.trainable().items()}
        super().around_step(context, phase, step)
        self.steps.append((phase, before))
        if phase == "post":
            for layer, A in a_of(context).items():
                if context.kept[layer].rank:
                    self.inside.append(leak(A, context.kept[layer]))


def a_of(context):
    modules = {layer: context.branches.base.get_submodule(layer) for layer in context.layers.names}
    return {layer: module.lora_A["domain"].weight.detach() for layer, module in modules.items()}


def begin(base, records, options, kind=GPM, history="merged"):
    """Strategy, adapters and memory before the first domain."""
    adapters, kept, strategy = Adapters(base, history, 0.0), {}, kind(options)
    strategy.prepare(context_of(base, adapters, records, -1, kept))
    return strategy, adapters, kept


def second_domain(base, records, options, folder, kind=GPM, history="merged"):
    """The context of the second domain after the first was learnt."""
    strategy, adapters, kept = begin(base, records, options, kind, history)
    learn(strategy, context_of(base, adapters, records, 0, kept), folder / "first", epochs=0.5)
    return strategy, context_of(base, adapters, records, 1, kept)


def tokens_of(base, adapters, records):
    samples = [encode(base, [records[position]]) for position in CHOSEN]
    return captured_tokens(adapters.model, modules_of(base), samples)


# -- the memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["merged", "factors"])
def test_the_memory_follows_the_reference_and_covers_what_each_domain_sends(base, tiny_records, tmp_path, history):
    options = options_of(energy=0.8, energy_end=0.96)
    strategy, adapters, kept = begin(base, tiny_records, options, history=history)
    ranks = dict.fromkeys(adapters.layers, 0)
    for index, name in enumerate(tiny_records):
        context, before = context_of(base, adapters, tiny_records, index, kept), columns_of(kept)
        energy = oracle.threshold(0.8, 0.96, index, 2)
        open_branch(strategy, context)
        fit(strategy, context, tmp_path / name)
        tokens = tokens_of(base, adapters, tiny_records[name])
        strategy.after_domain(context)
        assert context.facts["energy"] == pytest.approx(energy) and len(kept) == 16
        for layer, basis in kept.items():
            expected = oracle.grow(before[layer], tokens[layer], energy)
            assert np.array_equal(basis.columns[:, : ranks[layer]].numpy(), before[layer])
            assert basis.rank == expected.shape[1] and gram_error(basis) < 1e-5
            assert subspace.projector_difference(basis.columns.numpy(), expected) < 1e-4
            assert oracle.coverage(basis.columns.numpy(), tokens[layer]) >= energy - 1e-6
            assert ranks[layer] <= basis.rank <= basis.d_in
            assert context.facts["added"][layer] == basis.rank - ranks[layer]
            ranks[layer] = basis.rank
        adapters.restore([*adapters.past, adapters.read()], [])
    assert all(ranks.values())


def test_layers_with_the_same_input_keep_the_same_directions(base, tiny_records, tmp_path):
    _, context = second_domain(base, tiny_records, options_of(), tmp_path)
    groups = [group for group in context.layers.groups() if len(group) > 1]
    assert len(groups) == 4  # q, k, v and gate, up of two blocks
    for first, *others in groups:
        assert all(torch.equal(context.kept[layer].columns, context.kept[first].columns) for layer in others)


def test_the_memory_never_falls_nor_exceeds_the_space_at_full_energy(base, tiny_records, tmp_path):
    _, context = second_domain(base, tiny_records, options_of(energy=1.0, energy_end=1.0), tmp_path)
    before = {layer: basis.rank for layer, basis in context.kept.items()}
    strategy = GPM(options_of(energy=1.0, energy_end=1.0))
    strategy.after_domain(context)
    assert all(before[layer] <= basis.rank <= basis.d_in for layer, basis in context.kept.items())
    assert any(basis.rank == basis.d_in for basis in context.kept.values())


@pytest.mark.parametrize("index", [0, 1])
def test_the_published_rule_keeps_one_direction_fewer_at_the_first_domain_alone(base, tiny_records, index):
    found = {}
    for rule in ("reach", "below_legacy"):
        strategy, adapters, kept = begin(base, tiny_records, options_of(energy=0.9, energy_end=0.9, rank_rule=rule))
        strategy.after_domain(context_of(base, adapters, tiny_records, index, kept))
        found[rule] = {layer: basis.rank for layer, basis in kept.items()}
    for layer, features in tokens_of(base, adapters, list(tiny_records.values())[index]).items():
        published = index == 0
        empty = subspace.empty_basis(features.shape[1])
        assert found["reach"][layer] == oracle.grow(empty, features, 0.9).shape[1]
        assert found["below_legacy"][layer] == oracle.grow(empty, features, 0.9, published).shape[1]
    assert max(found["reach"].values()) > 2 and (found["reach"] != found["below_legacy"]) == (index == 0)


def test_sketches_that_cannot_decide_are_replaced_by_exact_moments(base, tiny_records):
    found = {}
    for statistic in ("exact", "sketch"):
        options = options_of(energy=0.999, feature_statistic=statistic, feature_sketch_size=2)
        strategy, adapters, kept = begin(base, tiny_records, options)
        strategy.after_domain(context_of(base, adapters, tiny_records, 0, kept))
        found[statistic] = columns_of(kept)
    assert all(np.array_equal(found["exact"][layer], found["sketch"][layer]) for layer in found["exact"])


# -- the branch -------------------------------------------------------------------------------------------------------


def test_a_starts_outside_of_the_memory_with_rows_as_long_as_those_of_plain_lora(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path)
    kept = columns_of(context.kept)
    plain = fresh_branch(context_of(base, context.branches, tiny_records, 1), strategy.options).A
    open_branch(strategy, context)
    branch = context.branches.branch
    assert branch.train == ("A", "B") and not branch.B and set(branch.alpha.values()) == {8.0}
    for layer, A in branch.A.items():
        assert np.allclose(A.numpy(), oracle.opened_a(plain[layer].numpy(), kept[layer]), atol=1e-6)
        assert not torch.allclose(A, plain[layer], atol=1e-3)
        assert leak(A, context.kept[layer]) < 1e-6


def test_rows_in_a_single_free_dimension_are_outside_of_the_memory_too():
    from mllm_keeplora.strategies.subspace.gpm import _outside

    kept = Basis.from_columns(torch.linalg.qr(torch.randn(300, 299, dtype=torch.float64))[0])
    A = _outside(torch.randn(4, 300), kept)
    assert A.shape == (1, 300) and leak(A, kept) < 1e-6
    assert _outside(torch.randn(4, 300), Basis.from_columns(torch.eye(300))).shape == (0, 300)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_is_outside_of_the_memory_after_every_step_of_adam(base, tiny_records, tmp_path, weight_decay):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path, Watched)
    assert not strategy.inside
    open_branch(strategy, context)
    start = {layer: A.clone() for layer, A in a_of(context).items()}
    fit(strategy, context, tmp_path / "second", epochs=2.0, weight_decay=weight_decay)
    assert len(strategy.inside) == 6 * 16 and max(strategy.inside) < 1e-5
    assert all(not torch.equal(A, start[layer]) for layer, A in a_of(context).items())


def test_what_was_in_the_memory_passes_a_layer_as_before(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path)
    adapters, kept = context.branches, columns_of(context.kept)
    before = {layer: adapters.weight(layer).clone() for layer in adapters.layers}
    learn(strategy, context, tmp_path / "second", epochs=2.0)
    rng = np.random.default_rng(0)
    for layer, weight in before.items():
        inputs = torch.tensor(rng.standard_normal((5, kept[layer].shape[1])) @ kept[layer].T).float()
        then, now = inputs @ weight.mT, inputs @ adapters.weight(layer).mT
        assert (now - then).norm() < 1e-4 * then.norm()
        assert (adapters.weight(layer) - weight).norm() > 1e-2 * weight.norm(), "training must do something"


def test_a_projected_gradient_leaks_under_adam_and_a_projection_after_the_step_does_not(
    new_base, tiny_records, tmp_path
):
    leaks = {}
    for mode in ("post", "grad"):
        strategy, context = second_domain(new_base(), tiny_records, options_of(mode=mode), tmp_path / mode)
        kept = {layer: Basis.from_columns(basis.columns) for layer, basis in context.kept.items()}
        factors = learn(strategy, context, tmp_path / mode / "second")
        leaks[mode] = [leak(factors.delta(layer), kept[layer]) for layer in factors.A]
    assert max(leaks["post"]) < 1e-5 and np.median(leaks["grad"]) > 1e-3


@pytest.mark.parametrize("mode", ["post", "grad"])
def test_under_plain_gradient_descent_both_modes_follow_the_reference(base, tiny_records, tmp_path, mode):
    strategy, context = second_domain(base, tiny_records, options_of(mode=mode), tmp_path, Watched)
    kept = columns_of(context.kept)
    open_branch(strategy, context)
    strategy.steps.clear()
    fit(strategy, context, tmp_path / "second", epochs=2.0, lr=0.1, **SGD)
    assert [phase for phase, _ in strategy.steps] == ["grad", "post"] * 2
    before = {name: values for name, values in strategy.steps[2][1].items() if ".lora_A." in name}
    rule = oracle.sgd_then_projection if mode == "post" else oracle.sgd_with_projected_gradient
    assert len(before) == 16
    for name, (A, gradient) in before.items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.domain.weight")
        now = a_of(context)[layer].numpy()
        assert np.allclose(now, rule(A.numpy(), gradient.numpy(), 0.1, kept[layer]), atol=1e-6)
        assert gradient.abs().max() > 1e-4 and not np.array_equal(now, A.numpy())


def test_what_a_step_gives_no_gradient_is_left_alone(base, tiny_records, tmp_path):
    """As the projector after a step without pictures."""
    strategy, context = second_domain(base, tiny_records, options_of(mode="grad"), tmp_path)
    open_branch(strategy, context)
    trained = context.branches.trainable()
    for name, parameter in trained.items():
        parameter.grad = None if "projector" in name else torch.ones_like(parameter)
    strategy.around_step(context, "grad", Step(0, 4))
    assert [name for name, parameter in trained.items() if parameter.grad is None] == [
        name for name in trained if "projector" in name
    ]


def test_with_an_empty_memory_training_is_plain_lora_bit_for_bit(new_base, tiny_records, tmp_path):
    """Two domains, and a memory that grows by nothing."""
    runs = []
    plain = Finetune(FinetuneOptions(rank=RANK, alpha=8.0))
    for strategy in (GPM(options_of(energy=0.0, energy_end=0.0)), plain):
        base, kept = new_base(), {}
        adapters = Adapters(base, "merged", 0.0)
        strategy.prepare(context_of(base, adapters, tiny_records, -1, kept))
        for index in range(2):
            context = context_of(base, adapters, tiny_records, index, kept)
            runs.append(learn(strategy, context, tmp_path / f"{len(runs)}"))
    for mine, other in zip(runs[:2], runs[2:], strict=True):
        assert mine.alpha == other.alpha and len(mine.A) == 16
        for part in ("A", "B"):
            assert all(torch.equal(getattr(mine, part)[layer], getattr(other, part)[layer]) for layer in mine.A)


def test_a_layer_without_room_stays_as_it_is_and_one_with_little_learns_with_that(base, tiny_records, tmp_path):
    strategy, adapters, kept = begin(base, tiny_records, options_of())
    full, tight, *_ = adapters.layers
    kept[full] = Basis.from_columns(torch.eye(kept[full].d_in))
    kept[tight] = Basis.from_columns(torch.eye(kept[tight].d_in)[:, 2:])
    context = context_of(base, adapters, tiny_records, 0, kept)
    open_branch(strategy, context)
    branch = context.branches.branch
    assert full not in branch.A and branch.ranks[tight] == 2 and len(branch.A) == 15
    assert branch.alpha[tight] / 2 == 8.0 / RANK
    fit(strategy, context, tmp_path)
    assert not adapters.read().A[tight][:, 2:].any()


def test_a_domain_without_any_room_is_refused(base, tiny_records):
    strategy, adapters, kept = begin(base, tiny_records, options_of())
    kept.update({layer: Basis.from_columns(torch.eye(basis.d_in)) for layer, basis in kept.items()})
    with pytest.raises(UserError, match=r"Beta: no target layer has a direction left.*lower strategy.energy"):
        open_branch(strategy, context_of(base, adapters, tiny_records, 1, kept))


# -- options ----------------------------------------------------------------------------------------------------------


def test_only_the_projection_of_gradients_refuses_deepspeed():
    assert GPM(GPMOptions()).needs == frozenset()
    assert GPM(GPMOptions(mode="grad")).needs == {"gradients"}


def test_options_out_of_range_are_refused_in_words():
    for options, message in (
        ({"energy": 1.2}, "energy"),
        ({"mode": "pre"}, "mode"),
        ({"feature_samples": 1.5}, "whole number of records"),
        ({"energy_measure": "sigma4", "feature_statistic": "sketch"}, "exact or auto"),
    ):
        with pytest.raises(UserError, match=message):
            build_strategy(StrategyConfig(name="gpm", **options))
