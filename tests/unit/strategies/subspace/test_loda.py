"""LoDA: where A lies, what answers after recalibration, and steps that look ahead, against the slow reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.checks.engine import unfit_for
from mllm_keeplora.config import StrategyConfig, load_config
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import IGNORED
from mllm_keeplora.models.family import Sizes
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.context import Step
from mllm_keeplora.strategies.footprint import PassSizes
from mllm_keeplora.strategies.subspace import aligned
from mllm_keeplora.strategies.subspace.aligned import classes_of
from mllm_keeplora.strategies.subspace.loda import LoDA, LoDAOptions
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import loda as oracle
from tests.support.strategies import alone, context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import adapt, projector_parameters, random_shift
from tests.unit.conftest import captured_tokens, encode, logits_of

RANK, RIDGE = 3, 1e-6
PLAIN = {"schedule": "constant", "warmup_ratio": 0.0, "args": {"optim": "sgd"}}


def strategy_of(**options) -> LoDA:
    return LoDA(LoDAOptions(**{"rank": RANK, "alpha": 6.0, "feature_samples": 12, "rho_max": 0.0, **options}))


def moments_of(base, adapters, records) -> dict[str, np.ndarray]:
    """Second moments of every target layer's inputs, records one by one, the first token of a text left out."""
    modules, parts = {name: base.model.get_submodule(name) for name in base.parts.target_layers}, []
    for record in records:
        sample = encode(base, [record])
        tokens, length = captured_tokens(adapters.model, modules, [sample]), sample["input_ids"].shape[1]
        parts.append({name: rows[len(rows) == length :] for name, rows in tokens.items()})
    together = {name: np.concatenate([part[name] for part in parts]) for name in modules}
    return {name: rows.T @ rows / len(rows) for name, rows in together.items()}


@pytest.fixture
def learnt(base, tiny_records):
    """Function (**options) -> what was seen of two domains; training is a draw."""

    def of(**options):
        adapters, generator, state, seen = adapt(base), torch.Generator().manual_seed(0), {}, []
        for index, records in enumerate(tiny_records.values()):
            strategy = strategy_of(**options)  # a new object: nothing lasts but its state
            strategy.load_state_dict(state)
            context = context_of(base, adapters, tiny_records, index)
            before = moments_of(base, adapters, records)
            batch = encode(base, records[:2])
            closed = logits_of(adapters.model, batch)
            begun = strategy.before_domain(context)
            adapters.open(begun)
            assert torch.equal(logits_of(adapters.model, batch), closed)
            B = {n: torch.randn(context.layers.d_out(n), len(A), generator=generator) for n, A in begun.A.items()}
            trained = Factors(begun.A, {n: 0.3 * each for n, each in B.items()}, begun.alpha)
            adapters.load(trained, {})
            during = moments_of(base, adapters, records)
            strategy.after_domain(context)
            assert all(torch.equal(adapters.read().B[n], each) for n, each in trained.B.items())
            answering = trained if context.replacement is None else context.replacement.factors
            adapters.restore([*adapters.past, answering], [])
            after = moments_of(base, adapters, records)
            state = strategy.state_dict()
            told = SimpleNamespace(begun=begun, trained=trained, answering=answering, context=context, state=state)
            seen.append(SimpleNamespace(**vars(told), before=before, during=during, after=after, strategy=strategy))
        return seen

    return of


def projector_onto(rows: np.ndarray) -> np.ndarray:
    Q = np.linalg.qr(rows.T)[0]
    return Q @ Q.T


def test_the_first_domain_trains_a_general_branch_alone_and_answers_as_it_was_trained(learnt):
    first = learnt()[0]
    assert first.begun.train == ("A", "B") and first.context.replacement is None
    for layer, rows in first.begun.A.items():
        assert torch.allclose(rows @ rows.mT, torch.eye(RANK) / 3, atol=1e-4)
        S, scaling = first.before[layer], first.begun.alpha[layer] / len(rows)
        U = np.sqrt(3) * rows.numpy().T
        wanted = oracle.energy(oracle.general(0 * S, S, RANK), S)
        assert scaling == pytest.approx(2 * 0.25) and np.isclose(oracle.energy(U, S), wanted, rtol=1e-4)


def test_later_domains_have_a_general_and_an_isolated_branch_of_frozen_a(learnt):
    first, second = learnt(isolated_rank=2)
    assert second.begun.train == ("B",) and len(second.begun.A) == 16
    top = 2 * 0.5  # scaling of what weighs most
    for layer, rows in second.begun.A.items():
        assert len(rows) == RANK + 2 and second.begun.alpha[layer] / len(rows) == pytest.approx(top)
        old, new = first.after[layer], second.before[layer]
        general, isolated = np.sqrt(3) * (0.5 / 0.25) * rows[:RANK].numpy(), np.sqrt(3) * rows[RANK:].numpy()
        assert np.allclose(general @ general.T, np.eye(RANK), atol=1e-4)
        assert np.allclose(isolated @ isolated.T, np.eye(2), atol=1e-4)
        wanted = oracle.energy(oracle.general(old, new, RANK), old + new)
        assert np.isclose(oracle.energy(general.T, old + new), wanted, rtol=1e-4)
        U, mu = oracle.isolated(old, new, 3, RIDGE * np.trace(old) / len(old))
        if mu[1] > 1.05 * mu[2]:  # else which two they are is a matter of rounding
            assert np.allclose(projector_onto(isolated), projector_onto(U[:, :2].T), atol=2e-2), layer


@pytest.mark.parametrize("recalibration", ["diagonal", "full"])
def test_what_answers_is_recalibrated_by_old_and_new_moments_and_has_orthonormal_rows(learnt, recalibration):
    first, second = learnt(recalibration=recalibration, gamma=2.0)
    assert second.context.replacement.instead_of == "unit"
    kept = []
    for layer, rows in second.trained.A.items():
        old, new = first.after[layer], second.during[layer]
        A = 2 * rows[:RANK].double().numpy()
        solve = oracle.recalibrated if recalibration == "full" else oracle.recalibrated_diagonally
        weights = solve(A, old, new, 2.0)
        weights = weights if recalibration == "full" else np.diag(weights)
        kept.append(np.diag(weights).mean())
        B = second.trained.B[layer].double().numpy()
        general = 2 * 0.25 * B[:, :RANK] @ weights @ A
        isolated = 2 * 0.5 * B[:, RANK:] @ rows[RANK:].double().numpy()
        assert np.allclose(second.answering.delta(layer), general + isolated, atol=1e-3), layer
        for part in (second.answering.A[layer][:RANK], second.answering.A[layer][RANK:]):
            assert torch.allclose(part @ part.mT, torch.eye(RANK) / 3, atol=1e-4)
        J = [
            oracle.error(B[:, :RANK], A, each, old, new, 2.0) for each in (weights, np.eye(RANK), np.zeros((RANK,) * 2))
        ]
        assert recalibration == "diagonal" or J[0] <= min(J[1:]) * (1 + 1e-9)
    assert second.context.facts["recalibration"]["mean"] == pytest.approx(np.mean(kept), abs=1e-3)


def test_moments_are_added_once_as_answered_or_twice(learnt):
    for options, parts in (({}, ("after",)), ({"stats_per_task": "double"}, ("during", "after"))):
        first, second = learnt(**options)
        for layer, total in second.strategy.moments.items():
            wanted = sum(getattr(each, part)[layer] for each in (first, second) for part in parts)
            assert np.allclose(total, wanted, rtol=1e-3, atol=1e-4 * wanted.max()), layer
    assert len({id(each) for each in second.strategy.moments.values()}) == len(second.state) < 16


def test_parts_can_be_left_out(learnt):
    second = learnt(recalibration="none", isolated_rank=0)[1]
    assert second.context.replacement is None and "recalibration" not in second.context.facts
    assert all(len(rows) == RANK for rows in second.begun.A.values())
    layer, rows = next(iter(second.begun.A.items()))
    assert second.trained.scaling(layer) * rows.norm(dim=1)[0] == pytest.approx(2 * 0.25 / np.sqrt(3), rel=1e-4)


def test_state_survives_a_restart(learnt, tmp_path):
    second = learnt()[1]
    write_tensors(tmp_path / "state.safetensors", second.state)
    again = strategy_of()
    again.load_state_dict(read_tensors(tmp_path / "state.safetensors"))
    assert again.moments.keys() == second.strategy.moments.keys()
    assert all(torch.equal(again.moments[n], each) for n, each in second.strategy.moments.items())
    again.load_state_dict({})
    assert not again.moments


@pytest.mark.parametrize("d", [2, 3, 4])
def test_the_first_isolated_direction_has_the_largest_ratio_by_brute_force(d):
    from mllm_keeplora.linalg import isolated_directions

    rng = np.random.default_rng(d)
    old, new = (X.T @ X / 50 for X in rng.standard_normal((2, 50, d)) * np.linspace(0.2, 2, d))
    u = isolated_directions(torch.tensor(old), torch.tensor(new), 1)[0].numpy()
    tried = rng.standard_normal((20000, d))
    ratios = np.einsum("ni,ij,nj->n", tried, new, tried) / np.einsum("ni,ij,nj->n", tried, old, tried)
    best = oracle.energy(u, new) / oracle.energy(u, old)
    assert ratios.max() <= best * (1 + 1e-5) and ratios.max() > 0.97 * best


# -- steps that look ahead --------------------------------------------------------------------------------------------


def test_a_step_ahead_is_that_of_the_reference():
    """On two quadratic losses, whose gradients are known everywhere; a parameter trained in full is not moved."""
    rng = np.random.default_rng(0)
    theta = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    aims = [{n: rng.standard_normal(v.shape) for n, v in theta.items()} for _ in range(2)]
    counts = (3, 5)
    parameters = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in theta.items()}
    full = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    labels = torch.tensor([[IGNORED, 7], [IGNORED, 8]])
    seen = []

    def mean_gradients(batches):
        (batch,) = batches
        half = 0 if batch["labels"][0, 1] == 7 else 1
        assert (batch["labels"] != IGNORED).sum() == 1
        seen.append(full.detach().clone())
        found = {n: each.detach() - torch.tensor(aims[half][n]) for n, each in parameters.items()}
        return found | {"full": full.detach() * (half + 1)}, torch.tensor([float(counts[half])])

    context = SimpleNamespace(
        branches=SimpleNamespace(trainable=lambda: parameters | {"full": full}, is_full=lambda name: name == "full"),
        passes=SimpleNamespace(mean_gradients=mean_gradients),
        processes=SimpleNamespace(gathered=lambda rows: rows),
    )
    strategy = strategy_of(rho_max=0.7)
    step = Step(4, 2, seed=1)
    batch = {"labels": labels, "input_ids": torch.zeros(2, 2, dtype=torch.int64)}
    assert strategy.batch(context, batch, step) is batch
    drawn = []
    patched = pytest.MonkeyPatch()

    class Drawing(aligned.random.Random):
        def random(self):
            drawn.append(super().random())
            return drawn[-1]

    with patched.context() as patch:
        patch.setattr(aligned.random, "Random", Drawing)
        strategy.around_step(context, "grad", step)
        strategy.around_step(context, "post", step)
    rho = 0.7 * drawn[-1]
    wanted = oracle.aligned(theta, lambda half, at: {n: v - aims[half][n] for n, v in at.items()}, counts, rho)
    for name, parameter in parameters.items():
        assert np.allclose(parameter.grad, wanted[name]) and np.array_equal(parameter.detach(), theta[name])
        plain = sum(count / 8 * (theta[name] - aim[name]) for count, aim in zip(counts, aims, strict=True))
        assert not np.allclose(parameter.grad, plain, atol=1e-3)
    assert np.allclose(full.grad, (3 + 2 * 5) / 8 * full.detach()) and len(seen) == 4
    assert all(torch.equal(each, full.detach()) for each in seen)


def answering(records, words):
    """Records whose answers are those words in turn."""
    return [
        replace(
            record,
            turns=tuple(
                Turn(turn.role, words[number % len(words)] if turn.role == "assistant" else turn.text)
                for turn in record.turns
            ),
        )
        for number, record in enumerate(records)
    ]


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_a_small_step_ahead_is_nearly_the_plain_gradient_however_batches_are_cut(base, tiny_records, tmp_path, micro):
    records = {"first": answering(tiny_records["Alpha"][:4], ("red", "green left", "right"))}
    changes = {}
    for rho in (0.0, 1e-6, 0.5):
        adapters, strategy = adapt(base), strategy_of(rho_max=rho)
        context = context_of(base, adapters, records, 0)
        open_branch(strategy, context)
        adapters.load(drawn_b(adapters, context), {})
        gradient = alone(base, adapters, records["first"])[1]
        before = {n: p.detach().clone() for n, p in adapters.trainable().items()}
        fit(strategy, context, tmp_path / f"{rho}", lr=0.1, micro_batch_size=micro, max_grad_norm=0.0, **PLAIN)
        after = adapters.trainable()
        changes[rho] = np.concatenate([(after[n].detach() - before[n]).double().numpy().ravel() for n in before])
        wanted = -0.1 * np.concatenate([gradient[n].ravel() for n in before])
        adapters.restore([], [])
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(changes[0.0] - wanted) < 1e-3 * size
    assert np.linalg.norm(changes[1e-6] - wanted) < 1e-3 * size
    assert np.linalg.norm(changes[0.5] - wanted) > 1e-2 * size


def drawn_b(adapters, context) -> Factors:
    generator, begun = torch.Generator().manual_seed(3), adapters.branch
    B = {n: 0.1 * torch.randn(context.layers.d_out(n), len(A), generator=generator) for n, A in begun.A.items()}
    return Factors(begun.A, B, begun.alpha)


def test_without_steps_ahead_a_training_is_plain_bit_for_bit(new_base, tiny_records, tmp_path):
    """And with answers all alike, which have nothing to agree with; with several answers it is not."""
    same = {"first": answering([record.first_exchange() for record in tiny_records["Alpha"]], ("red",))}
    found = []
    for records, rho in ((same, 0.0), (same, 0.5), (tiny_records, 0.0), (tiny_records, 0.5)):
        base = new_base()
        strategy = strategy_of(rho_max=rho)
        found.append(learn(strategy, context_of(base, adapt(base), records, 0), tmp_path / f"{len(found)}"))
    assert all(torch.equal(each, found[1].B[n]) and each.any() for n, each in found[0].B.items())
    assert not all(torch.equal(each, found[3].B[n]) for n, each in found[2].B.items())


@pytest.mark.parametrize("partition", ["answer", "random"])
def test_rows_are_told_apart_whatever_they_are_batched_with(base, tiny_records, partition):
    records = answering([record.first_exchange() for record in tiny_records["Alpha"][:6]], ("red", "green left"))
    records.append(records[0].untrained())
    whole = classes_of(encode(base, records), partition).tolist()
    assert whole == [int(classes_of(encode(base, [record]), partition)) for record in records]
    assert whole[-1] == 0 and 0 not in whole[:-1]
    if partition == "answer":
        assert len(set(whole)) == 3 and whole[:6:2] == [whole[0]] * 3
    else:
        assert len(set(whole)) > 3


def test_rows_of_a_dual_encoder_are_told_apart_by_the_texts_of_theirclasses_of():
    batch = {"labels": torch.tensor([1, 0, IGNORED, 1]), "input_ids": torch.tensor([[5, 6, 0], [5, 7, 8]])}
    batch["pixel_values"] = torch.arange(4.0)[:, None]
    classes = classes_of(batch, "answer")
    assert classes[0] == classes[3] != classes[1] and classes[2] == 0
    assert classes[1] != classes_of({**batch, "input_ids": batch["input_ids"].flip(0)}, "answer")[1]
    assert len(set(classes_of(batch, "random").tolist())) == 4


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_are_held_to_what_the_base_allows():
    sizes = {"a": (9, 9), "b": (5, 2)}
    with pytest.raises(UserError, match=r"strategy\.rank is 3, .* b has 2 inputs; allowed: at most 2"):
        LoDAOptions(rank=3).refuse_unfit(sizes, {})
    with pytest.raises(UserError, match=r"strategy\.isolated_rank is 3"):
        LoDAOptions(rank=2, isolated_rank=3).refuse_unfit(sizes, {})
    assert build_strategy(StrategyConfig(name="loda", preset="official-imagenet-r")).options.isolated == 64
    with pytest.raises(UserError, match="recalibration"):
        build_strategy(StrategyConfig(name="loda", recalibration="some"))


def test_deepspeed_is_refused_only_where_steps_look_ahead():
    for rho, told in ((0.0, 0), (0.1, 1)):
        config = load_config("mini_dcl_finetune", ["strategy.name=loda", f"strategy.rho_max={rho}", "deepspeed=zero2"])
        faults = unfit_for(config, build_strategy(config.strategy), 2)
        assert len(faults) == told and all("loda needs the gradients" in fault for fault in faults)


def test_what_trains_in_full_is_left_as_it_was_trained(new_base, tiny_records):
    """While the recalibrated branch is looked at beside it; it answers as it is."""
    base, strategy = new_base("full"), strategy_of()
    names = projector_parameters(base)
    adapters = adapt(base, full=names)
    for index in range(2):
        context = context_of(base, adapters, tiny_records, index)
        open_branch(strategy, context)
        adapters.load(drawn_b(adapters, context), random_shift(base, index))
        trained = {name: base.model.get_parameter(name).detach().clone() for name in names}
        strategy.after_domain(context)
        assert all(torch.allclose(base.model.get_parameter(n), each, atol=1e-6) for n, each in trained.items())
        adapters.restore([*adapters.past, adapters.read()], [*adapters.past_full, adapters.read_full()])
    assert context.replacement.instead_of == "unit" and context.replacement.full is None


def test_the_estimate_counts_what_later_branches_and_steps_ahead_take():
    wide = Sizes(saved=1.0, input_widths=(8, 6), blocks=1, width=8, loss=1.0, cached=1.0, text=0.0)
    sizes = PassSizes(wide, ((4, 8), (5, 6)), 3, 100, 10, 1.0, 4, 8, 1, 1, (1, 1))
    found = strategy_of(isolated_rank=2, rho_max=0.1).footprint(sizes)
    first = 16 * 3 * (4 + 5 + 8 + 6)  # A and B train, each with its gradient and Adam's two numbers
    later = 16 * (3 + 2) * (4 + 5) + 4 * (3 + 2) * (8 + 6)  # B trains
    assert found["train"] == {"isolated branch": max(0, later - first), "steps ahead": 4 * 4 * 100}
    assert found["always"] == {"summed moments": 8 * (64 + 36)}
    assert found["gradient"]["decomposition"] > found["consolidate"]["decomposition"]
    square = PassSizes(wide, ((8, 8),), 3, 100, 10, 1.0, 4, 8, 1, 1, (1, 1))
    later = 16 * 6 * 8 + 4 * 6 * 8 - 16 * 3 * 16
    assert strategy_of().footprint(square)["train"] == {"isolated branch": later} and later > 0
