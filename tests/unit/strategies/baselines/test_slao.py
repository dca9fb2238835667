"""SLAO: where each domain starts, what answers after it, and what its records say, against the slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.slao import SLAO, SLAOOptions
from tests.oracles import slao as oracle
from tests.support.strategies import context_of
from tests.unit.adapters.conftest import adapt


def strategy_of(**options) -> SLAO:
    return SLAO(SLAOOptions(rank=3, alpha=6.0, **options))


@pytest.fixture
def learnt(base, tiny_records):
    """Function (domains, **options) -> starts, trained branches, branches that answer, facts; training is a draw."""

    def of(domains, **options):
        adapters, generator = adapt(base), torch.Generator().manual_seed(0)
        starts, trained, answering, facts = [], [], [], []
        records = dict.fromkeys("abcde"[:domains], next(iter(tiny_records.values())))
        for index in range(domains):
            strategy = strategy_of(**options)  # a new object: nothing lasts but files
            context = context_of(base, adapters, records, index, trained=lambda place: (trained[place], {}))
            adapters.restore(answering[-1:], [])
            starts.append(strategy.before_domain(context))
            adapters.open(starts[-1])
            parts = [{n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in part.items()} for part in (
                starts[-1].A,
                starts[-1].B or {n: torch.zeros(context.layers.d_out(n), 3) for n in starts[-1].A},
            )]  # fmt: skip
            trained.append(Factors(*parts, starts[-1].alpha))
            adapters.load(trained[-1], {})
            strategy.after_domain(context)
            answering.append(trained[-1] if context.replacement is None else context.replacement.factors)
            assert context.replacement is None or context.replacement.instead_of == "all"
            facts.append(context.facts)
        return starts, trained, answering, facts

    return of


def test_a_domain_starts_from_the_last_trained_b_and_an_orthonormal_a(learnt):
    starts, trained, answering, _ = learnt(3)
    assert not starts[0].B and starts[0].carried
    for index in (1, 2):
        for layer, A in starts[index].A.items():
            wanted, R = oracle.restart(trained[index - 1].A[layer].double().numpy())
            assert np.allclose(A, wanted, atol=1e-5) and np.allclose(A @ A.mT, np.eye(3), atol=1e-5)
            assert (np.diag(R) >= 0).all()
            assert torch.equal(starts[index].B[layer], trained[index - 1].B[layer])
            assert index == 1 or not torch.allclose(starts[index].B[layer], answering[index - 1].B[layer], atol=1e-3)


def test_a_domain_starts_at_the_base_and_not_at_the_model_that_answers(base, tiny_records, learnt):
    starts, _, answering, _ = learnt(3)
    adapters, batch = adapt(base), base.family.training_batch(next(iter(tiny_records.values()))[:2])
    batch.pop("labels")

    def logits(past, branch):
        adapters.restore(past, [])
        if branch is not None:
            adapters.open(branch)
        with torch.no_grad():
            return adapters.model(**batch).logits

    begun = logits(answering[1:2], starts[2])
    start = Factors(starts[2].A, starts[2].B, starts[2].alpha)
    assert torch.allclose(begun, logits([start], None), atol=1e-4)
    assert not torch.allclose(begun, logits(answering[1:2], None), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"schedule": "linear"}, {"schedule": "constant", "rate": 0.3}])
def test_the_last_a_answers_with_a_blend_of_all_b(learnt, options):
    _, trained, answering, facts = learnt(3, **options)
    given = options.get("schedule", "sqrt"), options.get("rate", 0.5)
    assert answering[0] is trained[0]
    for count in (2, 3):
        for layer, B in answering[count - 1].B.items():
            Bs = [each.B[layer].double().numpy() for each in trained[:count]]
            weights = oracle.weights(count, *given)
            assert np.allclose(B, oracle.merged(Bs, *given), atol=1e-6)
            assert np.allclose(B, sum(w * b for w, b in zip(weights, Bs, strict=True)), atol=1e-6)
            assert torch.equal(answering[count - 1].A[layer], trained[count - 1].A[layer])
        assert np.allclose(facts[count - 1]["blend"], oracle.weights(count, *given))
        assert sum(facts[count - 1]["blend"]) == pytest.approx(1)


def test_published_weights_fall_fast_and_a_linear_schedule_is_a_mean():
    assert np.allclose(SLAOOptions().weights(3), (0.124, 0.299, 0.577), atol=1e-3)
    assert SLAOOptions().weights(8)[0] == pytest.approx(0.008, abs=1e-3)
    assert np.allclose(SLAOOptions(schedule="linear").weights(5), 0.2)


def test_a_compensated_b_preserves_what_was_learnt(learnt):
    starts, trained, _, _ = learnt(2, compensate_R=True)
    plain = learnt(2)[0]
    for layer, A in starts[1].A.items():
        assert torch.allclose(starts[1].B[layer] @ A, trained[0].B[layer] @ trained[0].A[layer], atol=1e-5)
        assert not torch.allclose(plain[1].B[layer] @ plain[1].A[layer], starts[1].B[layer] @ A, atol=1e-3)


def test_a_rank_that_inputs_cannot_hold_is_refused():
    with pytest.raises(UserError, match=r"strategy\.rank is 3, .* b has 2 inputs; allowed: at most 2"):
        SLAOOptions(rank=3).refuse_unfit({"a": (2, 3), "b": (5, 2)}, {})


def test_the_preset_has_the_published_rank_and_options_are_held_to_their_ranges():
    assert build_strategy(StrategyConfig(name="slao", preset="published")).options.rank == 8
    with pytest.raises(UserError, match="schedule"):
        build_strategy(StrategyConfig(name="slao", schedule="cubic"))
