"""InfLoRA: A is fixed in the new domain's inputs and outside of those of past domains; B alone is trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import Basis, leak, moment_rows
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.subspace.inflora import InfLoRA, InfLoRAOptions
from tests.oracles import inflora as oracle
from tests.oracles import subspace
from tests.support.bases import SOURCES, gram_error, moments_of, rows_of, sketch_of
from tests.support.keeplora import CHOSEN, columns_of, modules_of
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.conftest import captured_tokens, encode, logits_of, snapshot

RANK, SAMPLES, C = 3, 8, 1 / math.sqrt(3)


def options_of(**changes) -> InfLoRAOptions:
    values = {"rank": RANK, "alpha": 6.0, "energy": 0.6, "energy_end": 0.8, "energy_measure": "sigma2"}
    return InfLoRAOptions(**{**values, "feature_samples": SAMPLES, **changes})


def begin(base, records, options, history="merged"):
    adapters, kept, strategy = Adapters(base, history, 0.0), {}, InfLoRA(options)
    strategy.prepare(context_of(base, adapters, records, -1, kept))
    return strategy, adapters, kept


def second_domain(base, records, options, folder, history="merged"):
    """The context of the second domain after the first was learnt."""
    strategy, adapters, kept = begin(base, records, options, history)
    learn(strategy, context_of(base, adapters, records, 0, kept), folder / "first", epochs=0.5)
    return strategy, context_of(base, adapters, records, 1, kept)


def tokens_of(base, adapters, records):
    samples = [encode(base, [records[position]]) for position in CHOSEN]
    return captured_tokens(adapters.model, modules_of(base), samples)


# -- the start of A ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", ["features", "moments"])
@pytest.mark.parametrize("history", ["merged", "factors"])
def test_a_is_the_top_of_what_past_domains_leave_of_the_new_inputs(base, tiny_records, tmp_path, history, directions):
    options = options_of(directions=directions)
    strategy, adapters, kept = begin(base, tiny_records, options, history)
    for index, name in enumerate(tiny_records):
        context = context_of(base, adapters, tiny_records, index, kept)
        tokens, memory = tokens_of(base, adapters, tiny_records[name]), columns_of(kept)
        open_branch(strategy, context)
        A = adapters.branch.A
        assert len(A) == 16 and adapters.branch.train == ("B",)
        for layer, rows in A.items():
            matrix = oracle.seen(tokens[layer], "sigma2" if directions == "features" else "sigma4")
            expected = oracle.initial_a(oracle.remove(matrix, memory[layer]), RANK, C)
            assert np.abs(np.abs(np.sum(rows.numpy() * expected, axis=1)) - C**2).max() < 1e-4, layer
            gram = (rows.double() @ rows.double().mT).numpy()
            assert np.abs(gram - np.eye(RANK) / 3).max() < 1e-5
            assert np.linalg.norm(rows.numpy() @ memory[layer]) < 1e-5
        fit(strategy, context, tmp_path / name, epochs=0.5)
        strategy.after_domain(context)
        adapters.restore([*adapters.past, adapters.read()], [])
    assert all(memory[layer].shape[1] for layer in memory), "the second domain has something to avoid"


def test_the_published_directions_differ_a_little(base, tiny_records, tmp_path):
    """Singular vectors of P X X^T and of P X agree where nothing is removed, and nearly where something is."""
    _, adapters, kept = begin(base, tiny_records, options_of())
    found = {}
    memory = {layer: Basis.from_columns(torch.eye(basis.d_in)[:, :5]) for layer, basis in kept.items()}
    for removed in (False, True):
        for directions in ("features", "moments"):
            context = context_of(base, adapters, tiny_records, 0, memory if removed else kept)
            open_branch(InfLoRA(options_of(directions=directions)), context)
            found[removed, directions] = adapters.branch.A
            adapters.restore([], [])
    for removed in (False, True):
        angles = [
            subspace.principal_angles(found[removed, "features"][layer].mT, found[removed, "moments"][layer].mT)[-1]
            for layer in kept
        ]
        assert (max(angles) > 1e-3) == removed and max(angles) < 1.0


def test_layers_with_the_same_input_begin_with_the_same_a(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path)
    groups = [group for group in context.layers.groups() if len(group) > 1]
    open_branch(strategy, context)
    A = context.branches.branch.A
    assert len(groups) == 4
    assert all(torch.equal(A[layer], A[first]) for first, *others in groups for layer in others)


def test_row_length_and_alpha_are_those_asked_for_and_the_scaling_is_kept_where_room_is_short(base, tiny_records):
    strategy, adapters, kept = begin(base, tiny_records, options_of(row_length=1.0))
    full, tight, *_ = adapters.layers
    kept[full] = Basis.from_columns(torch.eye(kept[full].d_in))
    kept[tight] = Basis.from_columns(torch.eye(kept[tight].d_in)[:, 2:])
    open_branch(strategy, context_of(base, adapters, tiny_records, 0, kept))
    branch = adapters.branch
    assert full not in branch.A and branch.ranks[tight] == 2 and len(branch.A) == 15
    for layer, A in branch.A.items():
        assert torch.allclose(A.norm(dim=1), torch.ones(len(A)), atol=1e-5)
        assert branch.alpha[layer] / len(A) == 2.0


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_is_bit_equal_after_training_and_has_no_place_in_the_optimiser(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path)
    open_branch(strategy, context)
    A = {layer: each.clone() for layer, each in context.branches.branch.A.items()}
    before = snapshot(context.branches.model)
    steps = []
    strategy.around_step = lambda context, phase, step: steps.append(step)
    fit(strategy, context, tmp_path / "second", weight_decay=0.1)
    optimised = [parameter for group in steps[-1].optimizer.param_groups for parameter in group["params"]]
    trained = context.branches.trainable()
    assert {id(each) for each in optimised} == {id(each) for each in trained.values()} and len(trained) == 16
    changed = {name for name, value in snapshot(context.branches.model).items() if not torch.equal(value, before[name])}
    assert changed == set(trained) and all(".lora_B." in name for name in changed)
    assert all(torch.equal(each, A[layer]) for layer, each in context.branches.read().A.items())


def test_no_b_whatsoever_moves_what_is_in_the_memory(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path)
    kept = {layer: Basis.from_columns(basis.columns) for layer, basis in context.kept.items()}
    factors = learn(strategy, context, tmp_path / "second", epochs=2.0)
    generator = torch.Generator().manual_seed(0)
    for layer, basis in kept.items():
        assert basis.rank > 0 and factors.delta(layer).norm() > 0
        assert leak(factors.delta(layer), basis) < 1e-5
        factors.B[layer] = 100 * torch.randn(factors.B[layer].shape, generator=generator)
        assert leak(factors.delta(layer), basis) < 1e-5


def test_one_gradient_descent_step_is_the_projected_step_of_the_weight(base, tiny_records, tmp_path):
    records = {"Alpha": tiny_records["Alpha"], "Beta": tiny_records["Beta"][0:8:2]}
    assert {len(record.turns) for record in records["Beta"]} == {2}, "equal numbers of answer tokens"
    strategy, context = second_domain(base, records, options_of(), tmp_path)
    gradients = context.passes.gradients(4)
    open_branch(strategy, context)
    facts = fit(
        strategy, context, tmp_path / "second", lr=0.05, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0,
        args={"optim": "sgd"},
    )  # fmt: skip
    factors = context.branches.read()
    assert facts["steps"] == 1
    for layer in factors.A:
        expected = oracle.step_of_weight(gradients[layer].mean.numpy(), factors.A[layer].numpy(), 6.0 / RANK, 0.05)
        assert np.linalg.norm(expected) > 0
        assert np.linalg.norm(factors.delta(layer).numpy() - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("history", ["merged", "factors"])
def test_logits_before_and_after_the_merge_agree(base, tiny_records, tmp_path, history):
    strategy, context = second_domain(base, tiny_records, options_of(), tmp_path, history)
    batch, adapters = encode(base, tiny_records["Beta"][:3]), context.branches
    start = logits_of(adapters.model, batch)
    open_branch(strategy, context)
    assert torch.allclose(logits_of(adapters.model, batch), start, atol=1e-5)
    fit(strategy, context, tmp_path / "second")
    live = logits_of(adapters.model, batch)
    adapters.restore([*adapters.past, adapters.read()], [])
    assert torch.allclose(logits_of(adapters.model, batch), live, atol=1e-4)
    assert (live - start).abs().max() > 1e-2


# -- the memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["sigma2", "sigma4"])
def test_the_memory_grows_by_the_inputs_of_the_finished_branch(base, tiny_records, tmp_path, measure):
    options = options_of(energy=0.8, energy_end=1.0, energy_measure=measure)
    strategy, context = second_domain(base, tiny_records, options, tmp_path)
    before = columns_of(context.kept)
    open_branch(strategy, context)
    fit(strategy, context, tmp_path / "second")
    tokens = tokens_of(base, context.branches, tiny_records["Beta"])
    strategy.after_domain(context)
    energy = oracle.threshold(0.8, 1, 2)
    assert context.facts["energy"] == pytest.approx(energy) and len(context.kept) == 16
    for layer, basis in context.kept.items():
        dual = oracle.Dual(basis.d_in)
        dual.stored, dual.is_first = before[layer], False
        dual.update(tokens[layer], energy, measure)
        assert basis.rank + dual.free.shape[1] == basis.d_in and gram_error(basis) < 1e-5
        assert np.linalg.norm(dual.free.T @ basis.columns.numpy(), 2) < 1e-4
    assert any(basis.rank > before[layer].shape[1] for layer, basis in context.kept.items())


@pytest.mark.parametrize("source", ["rows", "moments64"])
@pytest.mark.parametrize("measure", ["sigma2", "sigma4"])
@pytest.mark.parametrize("rule", ["reach", "below_legacy"])
def test_the_growing_memory_and_dual_gpm_are_the_same_subspace_and_give_the_same_a(source, measure, rule):
    """Both storages, over the switch from one to the other; the dual one never has more than d_in / 2 columns."""
    d_in, modes = 24, []
    for seed in range(3):
        memory, dual = Basis(d_in), oracle.Dual(d_in)
        for domain in range(6):
            features = rows_of(200, 100 * seed + domain, rank=8, decay=0.5)
            given = SOURCES[source](features)
            if memory.rank < d_in:
                found = memory.missing(given, 1.0, reference="residual", limit=3).mT
                wanted = oracle.initial_a(dual.left_of(features.double().numpy().T), len(found), C)
                assert len(found) > 0 and subspace.projector_difference(found.mT.numpy(), wanted.T) < 1e-4
            energy = oracle.threshold(0.9, domain, 6)
            grown_by = moment_rows(given) if measure == "sigma4" else given
            memory.grow(grown_by, energy, rule=rule if domain == 0 else "reach")
            dual.update(features.numpy(), energy, measure, published=rule == "below_legacy")
            modes.append(dual.mode)
            assert dual.stored.shape[1] <= d_in / 2
            stored = dual.stored.shape[1]
            assert memory.rank == (stored if dual.mode == "remove" else d_in - stored)
            assert np.linalg.norm(dual.free.T @ memory.columns.double().numpy()) < 1e-4
    assert {"remove", "retain"} == set(modes)


def test_a_first_domain_that_fills_half_the_space_is_kept_and_not_its_opposite(base, tiny_records):
    strategy, adapters, kept = begin(base, tiny_records, options_of(energy=0.999, rank_rule="below_legacy"))
    strategy.after_domain(context_of(base, adapters, tiny_records, 0, kept))
    tokens, filled = tokens_of(base, adapters, tiny_records["Alpha"]), 0
    for layer, basis in kept.items():
        filled += basis.rank >= basis.d_in / 2
        assert subspace.coverage(basis.columns.numpy(), tokens[layer]) > 0.98
    assert filled > 0


def test_squared_energy_keeps_fewer_directions_and_those_of_the_moments():
    features = rows_of(300, 1)
    plain, squared, again = Basis(24), Basis(24), Basis(24)
    plain.grow(moments_of(features, torch.float64), 0.98)
    squared.grow(moment_rows(moments_of(features, torch.float64)), 0.98)
    again.grow(moment_rows(features), 0.98)
    assert 0 < squared.rank < plain.rank and squared.rank == again.rank
    assert torch.allclose(squared.columns, plain.columns[:, : squared.rank], atol=1e-5)


def test_a_sketch_has_no_moments_to_measure():
    with pytest.raises(ValueError, match=r"rows must be a torch.Tensor, got FrequentDirections"):
        moment_rows(sketch_of(rows_of(30, 1), 4))


# -- options ----------------------------------------------------------------------------------------------------------


def test_defaults_and_presets_are_the_published_numbers():
    options = InfLoRAOptions()
    assert (options.rank, options.alpha, options.energy, options.energy_end) == (10, 10.0, 0.98, 1.0)
    assert (options.energy_measure, options.row_length, options.rank_rule) == ("sigma4", C, "reach")
    assert [options.energy_at(t, 10) for t in (0, 9)] == pytest.approx([oracle.threshold(0.98, t, 10) for t in (0, 9)])
    paper = build_strategy(StrategyConfig(name="inflora", preset="paper")).options
    official = build_strategy(StrategyConfig(name="inflora", preset="official")).options
    assert (paper.row_length, paper.energy_measure, paper.directions) == (1.0, "sigma2", "features")
    assert (official.rank_rule, official.directions, official.energy_measure) == ("below_legacy", "moments", "sigma4")


def test_options_out_of_range_are_refused_in_words():
    for options, message in (({"row_length": 0.0}, "row_length"), ({"feature_statistic": "sketch"}, "exact or auto")):
        with pytest.raises(UserError, match=message):
            build_strategy(StrategyConfig(name="inflora", **options))


def test_a_domain_without_any_room_is_refused(base, tiny_records):
    strategy, adapters, kept = begin(base, tiny_records, options_of())
    kept.update({layer: Basis.from_columns(torch.eye(basis.d_in)) for layer, basis in kept.items()})
    with pytest.raises(UserError, match="Beta: no target layer has a direction left"):
        open_branch(strategy, context_of(base, adapters, tiny_records, 1, kept))
