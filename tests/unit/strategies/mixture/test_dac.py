"""DAC: what votes, what a domain leaves, and its penalty, against the slow reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mllm_keeplora import load_config
from mllm_keeplora.adapters import Adapters, Factors
from mllm_keeplora.checks.engine import unfit_for
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.strategies.mixture.dac import DAC, DACOptions, evenness
from tests.oracles import dac as oracle
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import adapt
from tests.unit.conftest import encode, logits_of, snapshot

SHAPE = {"rank": 6, "alpha": 12.0}  # of which four are in use, and two kept


def strategy_of(**options) -> DAC:
    return DAC(DACOptions(**{**SHAPE, **options}))


def begun(base, records, index=0, past=(), **options):
    """A strategy in a domain whose branch is open."""
    adapters, strategy = adapt(base), strategy_of(**options)
    adapters.restore(list(past), [])
    context = context_of(base, adapters, records, index)
    open_branch(strategy, context)
    return strategy, context


def vote(strategy, context, batch, number=0, share=(0, 1)):
    strategy.batch(context, batch, Step(number, len(batch["labels"]), share=share))
    return context.branches.mixer.masks.clone()


def kept_branch(base, seed, rank=2):
    """What an earlier domain may have left: a branch of all layers, of one rank."""
    generator, A, B = torch.Generator().manual_seed(seed), {}, {}
    for layer in base.parts.target_layers:
        module = base.model.get_submodule(layer)
        A[layer] = torch.randn(rank, module.in_features, generator=generator) / 4
        B[layer] = 0.3 * torch.randn(module.out_features, rank, generator=generator)
    return Factors(A, B, dict.fromkeys(A, 4.0))


# -- votes ---------------------------------------------------------------------------------------------------------


def test_a_steps_masks_are_those_of_all_its_questions_as_layers_receive_them(base, tiny_records):
    records = tiny_records["Beta"][:5]
    strategy, context = begun(base, tiny_records)
    masks = vote(strategy, context, encode(base, records))
    pool = context.branches.mixer
    alone = [context.passes.question_inputs(encode(base, [record])) for record in records]
    for row, layer in enumerate(context.layers.names):
        phis = [each[layer][0][0].double().numpy() for each in alone]
        R, c = (each.detach().double().numpy() for each in pool.router(layer).parameters())
        wanted = oracle.votes(phis, R, c, 4)
        assert strategy.counts[row].tolist() == wanted.tolist()
        assert masks[row].tolist() == oracle.leading(wanted, 4).tolist()


def test_micro_batches_in_any_order_use_the_experts_of_the_whole_step(base, tiny_records):
    records = [*tiny_records["Alpha"][:4], *tiny_records["Beta"][:4]]
    strategy, context = begun(base, tiny_records)
    wanted, parts = vote(strategy, context, encode(base, records)), []
    for start in (6, 0, 4, 2):
        parts.append(vote(strategy, context, encode(base, records[start : start + 2]), 1))
    assert torch.equal(parts[-1], wanted) and any(not torch.equal(each, wanted) for each in parts)
    assert (strategy.counts.sum(dim=1) == 2 * 8 * 4).all()


def test_what_a_branch_has_learnt_answers_and_idle_records_change_no_vote(base, tiny_records):
    record = tiny_records["Alpha"][0]
    strategy, context = begun(base, tiny_records, past=[kept_branch(base, 1)])
    vote(strategy, context, encode(base, [record]))
    wanted = strategy.counts.clone()
    start = context.branches.read()
    learnt = {n: torch.randn(B.shape, generator=torch.Generator().manual_seed(2)) for n, B in start.B.items()}
    context.branches.load(Factors(start.A, learnt, start.alpha), {})
    answered = replace(record, turns=(record.turns[0], replace(record.turns[1], text="left left blue")))
    for number, given in enumerate(([record], [answered], [record, tiny_records["Beta"][0].untrained()]), start=1):
        strategy.counts = torch.zeros_like(wanted)
        vote(strategy, context, encode(base, given), number)
        assert torch.equal(strategy.counts, wanted), number


def test_a_vote_changes_neither_the_model_nor_what_is_drawn_next(base, tiny_records):
    strategy, context = begun(base, tiny_records)
    model = context.branches.model.train()
    before, state = snapshot(model), torch.get_rng_state()
    vote(strategy, context, encode(base, tiny_records["Alpha"][:3]))
    assert torch.equal(torch.get_rng_state(), state) and model.training and context.branches.mixer.training
    assert all(torch.equal(each, before[name]) for name, each in snapshot(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_domains_that_differ_do_not_use_the_same_experts(base, tiny_records):
    """Random routers might send all questions to the same ones, as they nearly do within a domain."""
    strategy, context = begun(base, tiny_records)
    masks = [vote(strategy, context, encode(base, tiny_records[name]), n) for n, name in enumerate(("Alpha", "Beta"))]
    first, second = masks
    assert ((first != second).any(dim=1)).float().mean() > 0.5
    assert (strategy.counts > 0).sum(dim=1).float().mean() > 4.5


def test_votes_of_what_frozen_parts_see_are_of_each_question_too(base, tiny_records):
    records = tiny_records["Alpha"][:6]
    strategy, context = begun(base, tiny_records, phi="question")
    vote(strategy, context, encode(base, records))
    together, width = strategy.counts.clone(), sum(context.passes.feature_sizes())
    assert set(context.branches.mixer.inputs.values()) == {width}
    assert (together.sum(dim=1) == 24).all() and len({tuple(row) for row in together.tolist()}) > 1
    strategy.counts = None
    for number, record in enumerate(records, start=1):
        cut = replace(record, turns=(record.turns[0], replace(record.turns[1], text="red")))
        vote(strategy, context, encode(base, [cut]), number)
    assert torch.equal(strategy.counts, together)


# -- a domain ------------------------------------------------------------------------------------------------------


def test_counts_of_a_training_are_k_for_each_record_and_come_back_from_its_state(base, tiny_records, tmp_path):
    strategy, context = begun(base, tiny_records)
    fit(strategy, context, tmp_path, epochs=2, micro_batch_size=2)
    assert strategy.counts.shape == (len(context.layers.names), 6) and strategy.counts.dtype == torch.int64
    assert (strategy.counts.sum(dim=1) == 4 * 2 * 12).all()
    again = strategy_of()
    assert again.training_state() == {}
    again.load_training_state(strategy.training_state())
    assert torch.equal(again.counts, strategy.counts) and again.number == -1


def test_micro_batches_learn_what_one_batch_does(new_base, tiny_records, tmp_path):
    learnt = []
    for size in (4, 2):
        base = new_base()
        strategy, context = begun(base, tiny_records, 1, [kept_branch(base, 1)])
        fit(strategy, context, tmp_path / str(size), micro_batch_size=size)
        learnt.append((context.branches.read(), strategy.counts))
    (whole, counts), (parts, same) = learnt
    assert torch.equal(counts, same)
    assert all(torch.allclose(parts.B[layer], B, atol=1e-4) and B.abs().max() > 1e-3 for layer, B in whole.B.items())


def test_the_experts_with_most_votes_are_merged_and_no_other_matters(base, tiny_records, tmp_path):
    past, batch = [kept_branch(base, 1)], encode(base, tiny_records["Beta"][:3])
    strategy, context = begun(base, tiny_records, 1, past)
    fit(strategy, context, tmp_path, lr=3e-2)
    trained = context.branches.read()
    strategy.after_domain(context)
    answering, counts = context.replacement.factors, strategy.counts
    assert context.replacement.instead_of == "unit" and answering.ranks == dict.fromkeys(trained.A, 2)
    W = {layer: context.branches.pristine(layer) for layer in trained.A}
    context.branches.restore([*past, answering], [])
    for row, layer in enumerate(context.layers.names):
        A, B = (part[layer].double().numpy() for part in (trained.A, trained.B))
        wanted = oracle.kept_update(A, B, 2.0, counts[row].tolist(), 2)
        found = context.layers.weight(layer).double().numpy() - W[layer].double().numpy()
        assert np.allclose(found, wanted + past[0].delta(layer).double().numpy(), atol=1e-5)
        assert np.abs(wanted).max() > 1e-3 and np.linalg.matrix_rank(wanted, tol=1e-6) <= 2
    merged = logits_of(context.branches.model, batch)
    assert context.facts["votes"]["min"] <= context.facts["votes"]["evenness"] <= context.facts["votes"]["max"] <= 1
    # the pool, restricted to those; and the experts that were dropped with anything at all in them
    context.branches.restore(past, [])
    open_branch(strategy, context)
    for row, layer in enumerate(context.layers.names):
        dropped = torch.from_numpy(oracle.leading(counts[row].tolist(), 2)) == 0
        trained.B[layer][:, dropped] = 5.0
    context.branches.load(trained, {})
    pool = context.branches.mixer
    pool.active = 2
    pool.use(counts)
    context.branches.model.train()
    context.branches.look_at(batch)
    with torch.no_grad():
        live = context.branches.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert torch.allclose(live, merged, atol=1e-4)
    strategy.after_domain(context)
    assert all(torch.equal(B, answering.B[layer]) for layer, B in context.replacement.factors.B.items())


def test_a_pool_that_is_used_and_kept_as_a_whole_is_sequential_lora(new_base, tiny_records, tmp_path):
    learnt = []
    for strategy in (strategy_of(active=6, kept=6, strength=0.0), Finetune(FinetuneOptions(**SHAPE))):
        base = new_base()
        adapters = Adapters(base, "merged", 0.0)
        for index in range(2):
            learn(strategy, context_of(base, adapters, tiny_records, index), tmp_path / f"{len(learnt)}-{index}")
        learnt.append(adapters.past)
    for found, wanted in zip(*learnt, strict=True):
        for layer, A in wanted.A.items():
            assert torch.equal(found.A[layer], A) and torch.equal(found.B[layer], wanted.B[layer]), layer
            assert found.scaling(layer) == wanted.scaling(layer) and wanted.B[layer].abs().max() > 1e-3
    assert len(learnt[0]) == len(learnt[1]) == 2


def test_each_domain_begins_with_fresh_experts_and_routers_and_nothing_of_a_pool_stays(base, tiny_records, tmp_path):
    strategy, context = begun(base, tiny_records, 0)
    first = context.branches.branch
    vote(strategy, context, encode(base, tiny_records["Alpha"][:4]))
    context.branches.restore([kept_branch(base, 1)], [])
    context = context_of(base, context.branches, tiny_records, 1)
    open_branch(strategy, context)
    second, layer = context.branches.branch, context.layers.names[0]
    assert context.branches.mixer.masks is None and not second.B
    assert not torch.equal(first.A[layer], second.A[layer])
    assert not torch.equal(first.mixer.router(layer).weight, second.mixer.router(layer).weight)
    # a pool knows layers, not domains: it is as large in the second as in the first
    assert first.mixer.settings() == second.mixer.settings()
    assert all("Alpha" not in name and "Beta" not in name for name in second.mixer.stored()[1])
    strategy.load_training_state({})
    fit(strategy, context, tmp_path)
    strategy.after_domain(context)
    assert context.answering is None and strategy.state_dict() == {}


def test_routers_train_where_they_are_to_and_nowhere_else(new_base, tiny_records, tmp_path):
    for options, moves in (({}, False), ({"router_grad": "straight_through"}, True)):
        strategy, context = begun(new_base(), tiny_records, **options)
        pool = context.branches.mixer
        before = {layer: pool.router(layer).weight.clone() for layer in context.layers.names}
        fit(strategy, context, tmp_path / str(moves), lr=3e-2, micro_batch_size=2)
        moved = [not torch.equal(pool.router(layer).weight, each) for layer, each in before.items()]
        assert all(moved) if moves else not any(moved)
        assert sum("branch_mixer" in name for name in context.branches.trainable()) == 2 * len(moved) * moves


# -- AGO -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def penalised(base, tiny_records):
    """Function (past, **options) -> a strategy in its second domain, its context, and factors that have learnt."""

    def of(past, **options):
        strategy, context = begun(base, tiny_records, 1, past, **options)
        vote(strategy, context, encode(base, tiny_records["Beta"][:5]))
        start = context.branches.read()
        generator = torch.Generator().manual_seed(4)
        B = {layer: torch.randn(each.shape, generator=generator) for layer, each in start.B.items()}
        factors = Factors(start.A, B, start.alpha)
        context.branches.load(factors, {})
        return strategy, context, factors

    return of


def penalty(strategy, context):
    return strategy.extra_loss(context, {}, None, Step(0, 5))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ago_is_the_overlap_of_leading_columns_with_all_kept_ones(base, penalised, reduction):
    past = [kept_branch(base, 1), kept_branch(base, 2, rank=3)]
    strategy, context, factors = penalised(past, strength=0.7, reduction=reduction)
    loss, layers, leads = penalty(strategy, context), [], {}
    for row, layer in enumerate(context.layers.names):
        leads[layer] = oracle.leading(strategy.counts[row].tolist(), 2) > 0
        bank = np.concatenate([each.B[layer].double().numpy() for each in past], axis=1)
        assert bank.shape == (context.layers.d_out(layer), 5)
        layers.append((factors.B[layer].double().numpy()[:, leads[layer]], bank))
    assert float(loss) == pytest.approx(0.7 * oracle.ago(layers, reduction), rel=1e-5) and float(loss) > 0
    loss.backward()
    for name, parameter in context.branches.trainable().items():
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        touched = parameter.grad is not None and parameter.grad.abs().sum(dim=0) > 0
        assert (".lora_A." in name and touched is False) or touched.tolist() == leads[layer].tolist()


def test_ago_is_nothing_in_a_first_domain_and_where_columns_are_orthogonal(base, penalised):
    strategy, context, _ = penalised([])
    assert penalty(strategy, context) == 0.0
    past = [kept_branch(base, 1)]
    strategy, context, factors = penalised(past)
    assert float(penalty(strategy, context)) > 1e-3
    for layer, bank in past[0].B.items():
        Q = torch.linalg.qr(bank.double()).Q
        factors.B[layer] = (factors.B[layer].double() - Q @ (Q.mT @ factors.B[layer].double())).float()
    context.branches.load(factors, {})
    assert float(penalty(strategy, context)) < 1e-6
    strategy, context, _ = penalised(past, strength=0.0)
    assert penalty(strategy, context) == 0.0


# -- options -------------------------------------------------------------------------------------------------------


def test_published_numbers_and_their_shares_of_other_ranks(base):
    options = build_strategy(StrategyConfig(name="dac", preset="published")).options
    assert (options.rank, options.alpha, options.in_use, options.to_keep) == (12, 1.0, 8, 4)
    assert (options.strength, options.reduction, options.router_grad) == (0.1, "sum", "none")
    found = [(DACOptions(rank=rank).in_use, DACOptions(rank=rank).to_keep) for rank in (1, 2, 12, 16, 24)]
    assert found == [(1, 1), (1, 1), (8, 4), (11, 5), (16, 8)]
    strategy, context = begun(base, {"Alpha": []}, **options.model_dump())
    layers = context.layers
    trained = sum(each.numel() for each in context.branches.trainable().values())
    assert trained == sum(12 * (layers.d_in(layer) + layers.d_out(layer)) for layer in layers.names)
    assert strategy.needs == {"parameters"} and strategy.combine == "merge"


@pytest.mark.parametrize("name", ["active", "kept"])
def test_more_experts_than_there_are_cannot_be_used_or_kept(name):
    with pytest.raises(UserError, match=rf"strategy\.{name}: must be at most strategy\.rank 4, .* got 5"):
        build_strategy(StrategyConfig(name="dac", rank=4, **{name: 5}))


def test_what_frozen_parts_see_is_refused_of_a_dual_encoder():
    options = DACOptions(phi="question")
    options.refuse_unfit({}, {"a": "language", "b": None})
    with pytest.raises(UserError, match=r"strategy\.phi is 'question', .* allowed: 'inputs'"):
        options.refuse_unfit({}, {"a": "vision", "b": "text"})
    DACOptions().refuse_unfit({}, {"a": "vision"})


def test_routers_are_estimated_by_what_they_see():
    sizes = SimpleNamespace(layers=((7, 4), (3, 9)), rank=6, question=(20, 8))
    for phi, widths in (("inputs", (4, 9)), ("question", (20, 20))):
        found = strategy_of(phi=phi).footprint(sizes)["train"]["routers"]
        assert found == sum(each.numel() * 4 for width in widths for each in torch.nn.Linear(width, 6).parameters())


@pytest.mark.parametrize(("engine", "fits"), [("zero2", True), ("zero3", False)])
def test_zero3_is_refused_since_the_penalty_reads_whole_factors(engine, fits):
    config = load_config("mini_dcl_dac", [f"deepspeed={engine}"])
    assert (unfit_for(config, build_strategy(config.strategy), int(engine[-1])) == []) == fits


def test_evenness_is_one_where_votes_are_even_and_zero_where_one_expert_has_all():
    counts = torch.tensor([[3, 3, 3], [9, 0, 0], [0, 0, 0], [2, 2, 0]])
    assert evenness(counts).tolist() == pytest.approx([1, 0, 1, np.log(2) / np.log(3)])
