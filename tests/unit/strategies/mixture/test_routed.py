"""Routed branches: the discriminant against a float64 one, and a tiny model whose branches answer their questions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.adapters.mixers import load_mixer, rebuilt, save_mixer
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.models.causal.features import prompt_features
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.strategies.mixture.routed import Routed, RoutedOptions, whitening_of
from mllm_keeplora.system import distributed
from tests.oracles import routed as oracle
from tests.support.strategies import context_of, learn, open_branch
from tests.unit.adapters.conftest import random_factors
from tests.unit.conftest import encode, logits_of

WIDTH = 6
ROUTERS = ("discriminant", "prototypes", "least_squares")


class Asked:
    """A context that knows a domain's question features alone."""

    def __init__(self, features, index=0):
        self.features, self.domain = torch.tensor(features).float(), DomainInfo(index, f"domain {index}")
        self.wanted, self.answering, self.facts = None, None, {}
        self.passes = self.processes = self

    def question_features(self, samples, pictures=True):
        self.wanted = samples, pictures
        return self.features

    def feature_sizes(self, pictures=True):
        return (WIDTH - 2, 2) if pictures else (WIDTH - 2, 0)

    def gathered(self, rows):
        return rows

    def answer_with(self, mixer):
        self.answering = mixer

    def log(self, facts):
        self.facts.update(facts)


def questions(seed, count, width=WIDTH):
    """Correlated features of unequal scales around a mean of the domain's own; so are further ones of the same seed."""
    shape = np.random.default_rng(99).standard_normal((width, width)) * np.geomspace(0.01, 10, width)
    mean = 1.5 * np.random.default_rng(seed).standard_normal(width) @ shape
    return (mean + np.random.default_rng([seed, count]).standard_normal((count, width)) @ shape).astype(np.float32)


def router_of(domains, **options):
    strategy = Routed(RoutedOptions(**options))
    for index, features in enumerate(domains):
        context = Asked(features, index)
        strategy.after_domain(context)
    return context.answering, strategy, context


def answered_by(router, features):
    """Number of the domain that answers each question; None for the base."""
    chosen = router.choose(torch.tensor(features))
    assert set(chosen.flatten().tolist()) <= {0, 1} and (chosen.sum(dim=1) <= 1).all()
    return [int(row.argmax()) if row.any() else None for row in chosen]


DOMAINS = [questions(seed, count) for seed, count in ((1, 40), (2, 24), (3, 61))]
FOREIGN = np.concatenate([questions(seed, 50) for seed in (1, 2, 3, 4)])


@pytest.mark.parametrize("shrinkage", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("reject", [None, 0.6, 0.99])
def test_every_question_goes_where_the_linear_discriminant_sends_it(shrinkage, reject):
    router = router_of(DOMAINS, shrinkage=shrinkage, reject=reject)[0]
    exact = [domain.astype(np.float64) for domain in DOMAINS]
    wanted = [oracle.chosen(question, exact, shrinkage, reject) for question in FOREIGN.astype(np.float64)]
    assert answered_by(router, FOREIGN) == wanted
    assert {0, 1, 2} <= set(wanted) and (None in wanted) == (reject is not None)


@pytest.mark.parametrize("reject", [None, 0.6])
@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        ("prototypes", partial(oracle.by_prototypes, words=WIDTH - 2)),
        ("least_squares", partial(oracle.by_least_squares, ridge=0.02)),
    ],
)
def test_every_question_goes_to_the_domain_of_the_highest_score(kind, scores, reject):
    """Some questions have no pictures."""
    domains, foreign = ([each.copy() for each in group] for group in (DOMAINS, [FOREIGN]))
    for rows in (*domains, *foreign):
        rows[5::7, WIDTH - 2 :] = 0.0
    router, strategy, _ = router_of(domains, router=kind, reject=reject, ridge=0.02)
    exact = [domain.astype(np.float64) for domain in domains]
    wanted = [oracle.highest(question, exact, scores, reject) for question in foreign[0].astype(np.float64)]
    assert answered_by(router, foreign[0]) == wanted
    assert {0, 1, 2} <= set(wanted) and (None in wanted) == (reject is not None)
    assert ("scatter" in strategy.state_dict()) == (kind == "least_squares"), "prototypes need no matrix"
    fitted = [oracle.split(each)[0] for each in exact]
    found = 1 - router.distances(torch.tensor(foreign[0])).numpy()
    assert np.allclose(found, [scores(question, fitted) for question in foreign[0].astype(np.float64)], atol=1e-4)


@pytest.mark.parametrize("kind", ROUTERS)
def test_domains_one_by_one_in_any_order_give_what_all_give_at_once(kind):
    first = router_of(DOMAINS, reject=0.9, router=kind)[0]
    seen = 0
    for order in permutations(range(3)):
        router = router_of([DOMAINS[number] for number in order], reject=0.9, router=kind)[0]
        if kind == "discriminant":
            assert torch.allclose(router.whitening, first.whitening, rtol=1e-5)
        assert torch.allclose(router.limits, first.limits[list(order)], rtol=1e-4)
        chosen = [None if number is None else order[number] for number in answered_by(router, FOREIGN)]
        assert chosen == answered_by(first, FOREIGN)
        seen += 1
    assert seen == 6


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_run_that_goes_on_from_its_files_ends_with_the_same_router(kind):
    whole = router_of(DOMAINS, router=kind)[0]
    state = router_of(DOMAINS[:2], router=kind)[1].state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    strategy = Routed(RoutedOptions(router=kind))
    strategy.load_state_dict({name: value.clone() for name, value in state.items()})
    context = Asked(DOMAINS[2], 2)
    strategy.after_domain(context)
    found, wanted = context.answering.state_dict(), whole.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    strategy.load_state_dict({})
    assert strategy.state_dict() == {}


def test_a_stored_router_is_the_same_router(tmp_path):
    router = router_of(DOMAINS)[0]
    save_mixer(tmp_path / "mixer.safetensors", router)
    loaded = load_mixer(tmp_path / "mixer.safetensors")
    assert loaded.settings() == router.settings() == {"domains": 3, "width": WIDTH, "pictures": True}
    assert torch.equal(loaded.distances(torch.tensor(FOREIGN)), router.distances(torch.tensor(FOREIGN)))
    assert torch.equal(loaded.limits, router.limits) and not loaded.trained()


@pytest.mark.parametrize(("kind", "words"), [("prototypes", WIDTH - 2), ("least_squares", None)])
def test_a_stored_router_by_scores_is_the_same_router(tmp_path, kind, words):
    router = router_of(DOMAINS, router=kind)[0]
    router.features = "final_hidden"
    save_mixer(tmp_path / "mixer.safetensors", router)
    loaded = load_mixer(tmp_path / "mixer.safetensors")
    told = {"domains": 3, "width": WIDTH, "pictures": True, "features": "final_hidden", "words": words}
    assert loaded.settings() == told
    assert torch.equal(loaded.distances(torch.tensor(FOREIGN)), router.distances(torch.tensor(FOREIGN)))
    assert torch.equal(loaded.limits, router.limits)


def test_presets_are_the_published_routers():
    given = {name: RoutedOptions(**options) for name, options in Routed.presets.items()}
    told = {name: (each.router, each.features, each.reject) for name, each in given.items()}
    assert told == {
        "repro": ("prototypes", "frozen", None),
        "cf-router": ("least_squares", "final_hidden", None),
    }


@pytest.mark.parametrize("kind", ROUTERS)
def test_questions_that_show_nothing_at_all_are_a_domain_too(kind):
    """Features that are all zero have no length and no moments."""
    router = router_of([np.zeros((8, WIDTH), dtype=np.float32), DOMAINS[0]], router=kind, reject=None)[0]
    assert router.distances(torch.zeros(1, WIDTH)).isfinite().all()
    assert router.distances(torch.tensor(DOMAINS[0])).isfinite().all()
    alone = router_of([np.zeros((8, WIDTH), dtype=np.float32)], router=kind)[0]
    assert answered_by(alone, np.zeros((1, WIDTH), dtype=np.float32)) == [0]


def test_a_domains_own_questions_stay_with_it_even_where_features_outnumber_them():
    """Distances of questions that are fitted to are far too small then."""
    width, count, stayed = 80, 60, []
    for seed in range(12):
        own, fresh = questions(seed, count, width), questions(seed, 500, width)
        router, strategy, _ = router_of([own], reject=0.9)
        stayed += answered_by(router, fresh)
        fitted = torch.tensor(own[[row for row in range(count) if row % 4 != 3]])
        assert router.distances(fitted).max() < router.distances(torch.tensor(fresh)).median()
        assert int(strategy.state_dict()["counts"]) == len(fitted)
    assert 0.8 < np.mean([number == 0 for number in stayed]) < 0.93


def test_a_question_like_none_of_the_training_is_left_to_the_base_unless_told_otherwise():
    far = questions(1, 5) + 100
    assert answered_by(router_of(DOMAINS)[0], far) == [None] * 5
    assert None not in answered_by(router_of(DOMAINS, reject=None)[0], far)


def test_what_the_router_makes_of_training_questions_is_told():
    _, _, context = router_of(DOMAINS, reject=0.6)
    exact = [domain.astype(np.float64) for domain in DOMAINS]
    chosen = [[oracle.chosen(each, exact, 0.1, 0.6) for each in domain] for domain in exact]
    facts = context.facts["routing"]
    assert facts["own"] == pytest.approx(np.mean([number == 2 for number in chosen[2]]))
    assert facts["base"] == pytest.approx(np.mean([number is None for number in chosen[2]])) and facts["base"] > 0
    held = [np.mean([number == own for number in chosen[own][3::4]]) for own in range(3)]
    assert facts["held_out"] == pytest.approx(held)


@pytest.mark.parametrize("rows", [3, 40])
def test_whitening_inverts_the_shrunk_covariance_of_few_or_many_questions(rows):
    gaps = questions(7, rows).astype(np.float64)
    covariance = gaps.T @ gaps / rows
    found = whitening_of(torch.tensor(covariance), 0.2).numpy()
    shrunk = 0.8 * covariance + 0.2 * np.diag(np.diag(covariance))
    assert np.allclose(found @ shrunk @ found.T, np.eye(WIDTH), atol=1e-8)


def test_a_feature_that_never_varied_tells_a_question_apart_without_blowing_up():
    same = [np.concatenate([domain, np.full((len(domain), 1), 2.0)], axis=1) for domain in DOMAINS]
    router = router_of(same)[0]
    own, other = same[0][:4].copy(), same[0][:4].copy()
    other[:, -1] = 3.0
    assert router.distances(torch.tensor(other).float()).isfinite().all()
    assert answered_by(router, own.astype(np.float32)) == [0] * 4
    assert answered_by(router, other.astype(np.float32)) == [None] * 4


def test_questions_that_are_all_alike_are_told_from_others():
    router = router_of([np.full((8, WIDTH), 2.0, dtype=np.float32)])[0]
    assert answered_by(router, np.full((1, WIDTH), 2.0, dtype=np.float32)) == [0]
    assert answered_by(router, np.full((1, WIDTH), 2.1, dtype=np.float32)) == [None]


def test_too_few_records_are_an_error_before_anything_is_trained(base, tiny_records):
    records = {"Alpha": tiny_records["Alpha"][:3]}
    context = context_of(base, Adapters(base, "merged", 0.0), records, 0)
    with pytest.raises(UserError, match="domain Alpha: a router needs at least 4 records, got 3"):
        open_branch(Routed(RoutedOptions()), context)
    assert context.branches.branch is None


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_rows_of_processes_come_together_in_the_order_of_the_records(monkeypatch, world):
    """Five records: some of seven processes have none."""
    rows = torch.arange(10.0).view(5, 2)
    monkeypatch.setattr(distributed, "gather", lambda own: [rows[rank::world] for rank in range(world)])
    assert torch.equal(distributed.interleaved(rows[0::world]), rows)


# -- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["merged", "factors"])
def taught(request, new_base, tiny_records, tmp_path_factory):
    """A tiny model after two domains, every question sent to the nearest: base, adapters, factors, router, facts."""
    base = new_base()
    adapters = Adapters(base, request.param, 0.0)
    strategy, factors = Routed(RoutedOptions(rank=3, alpha=12.0, reject=None)), []
    for index, name in enumerate(tiny_records):
        adapters.restore([], [])
        context = context_of(base, adapters, tiny_records, index)
        factors.append(learn(strategy, context, tmp_path_factory.mktemp(name), lr=3e-2, epochs=2.0))
    return base, adapters, factors, context.answering, context.facts


@pytest.fixture
def mixed(tiny_records):
    """Questions of both domains in turn."""
    alpha, beta = tiny_records["Alpha"], tiny_records["Beta"]
    return [record.first_exchange() for pair in zip(alpha[:3], beta[:3], strict=True) for record in pair]


def test_each_question_is_answered_by_the_branch_of_its_domain(taught, mixed):
    base, adapters, factors, router, facts = taught
    batch, alone = encode(base, mixed), []
    for own in factors:
        adapters.restore([own], [])
        alone.append(logits_of(adapters.model, batch))
    adapters.restore(factors, [], router)
    adapters.look_at(batch)
    found = logits_of(adapters.model, batch)
    assert router.weights.tolist() == [[1, 0], [0, 1]] * 3
    for row in range(6):
        assert torch.allclose(found[row], alone[row % 2][row], atol=1e-4)
        assert not torch.allclose(found[row], alone[1 - row % 2][row], atol=1e-2)
    assert facts["routing"]["own"] == 1.0 and facts["routing"]["held_out"] == [1.0, 1.0]


def test_a_question_that_is_rejected_is_answered_by_the_base(taught, mixed):
    base, adapters, factors, router, _ = taught
    mute = replace(mixed[0], media=(), turns=(Turn("user", "yes no ?"), Turn("assistant", "green")))
    batch = encode(base, [mixed[0], mute])
    adapters.restore([], [])
    plain = logits_of(adapters.model, batch)
    strict = rebuilt(*router.stored())
    strict.limits.copy_(router.distances(prompt_features(base.model, encode(base, mixed))).min(dim=0).values * 10)
    adapters.restore(factors, [], strict)
    adapters.look_at(batch)
    found = logits_of(adapters.model, batch)
    assert strict.weights.tolist() == [[1, 0], [0, 0]]
    assert torch.allclose(found[1], plain[1], atol=1e-6) and not torch.allclose(found[0], plain[0], atol=1e-2)


def test_answers_in_a_batch_are_those_of_each_question_alone(taught, mixed):
    base, adapters, _, router, _ = taught
    adapters.restore([random_factors(base, seed, size=1.5) for seed in (1, 2)], [], router)
    together = generate(base, adapters.model, mixed, [""] * 6, 6)
    alone = [generate(base, adapters.model, [record], [""], 6)[0] for record in mixed]
    assert together == alone and {answer.text for answer in alone[::2]} != {answer.text for answer in alone[1::2]}


def test_what_is_answered_does_not_change_who_answers(taught, mixed):
    """A cache changes no logits, so the choice is made once, by the question."""
    base, adapters, factors, router, _ = taught
    adapters.restore(factors, [], router)
    for record in mixed[:2]:
        batch = encode(base, [record])
        adapters.look_at(batch)
        chosen, whole = router.weights.clone(), logits_of(adapters.model, batch)[0]
        start = int((batch["labels"][0] != -100).nonzero()[0])
        first = {name: value for name, value in batch.items() if name != "labels"}
        first |= {name: batch[name][:, :start] for name in ("input_ids", "attention_mask")}
        adapters.look_at(first)
        assert torch.equal(router.weights, chosen)
        with torch.no_grad():
            found = adapters.model(**first, use_cache=True)
            steps = [found.logits[0, -1]]
            for place in range(start, len(whole)):
                step = batch["input_ids"][:, place : place + 1]
                found = adapters.model(input_ids=step, past_key_values=found.past_key_values)
                steps.append(found.logits[0, -1])
        assert len(steps) > 1 and torch.allclose(torch.stack(steps), whole[start - 1 :], atol=1e-4)


@pytest.fixture(params=[(kind, features) for kind in ROUTERS for features in ("frozen", "final_hidden")], ids=str)
def chosen(request, new_base, tiny_records, tmp_path):
    """Base, adapters, strategy and mixers after one and two domains, by every router."""
    kind, features = request.param
    base = new_base()
    adapters, routers = Adapters(base, "merged", 0.0), []
    strategy = Routed(RoutedOptions(rank=3, router=kind, features=features, reject=None))
    for index, name in enumerate(tiny_records):
        adapters.restore([], [])
        context = context_of(base, adapters, tiny_records, index)
        learn(strategy, context, tmp_path / name, lr=3e-2, epochs=0.5)
        routers.append(rebuilt(*context.answering.stored()))
    return base, adapters, strategy, routers


def _seen(base, router, batch):
    """What a router is to look at, of a base without branches."""
    if router.features == "frozen":
        return prompt_features(base.model, batch)
    with torch.no_grad():
        told = {name: value for name, value in batch.items() if name != "labels"}
        states = base.model(**told, output_hidden_states=True).hidden_states[-1]
    rows = []
    for row, labels in enumerate(batch["labels"]):
        places = [p for p in range(int((labels != -100).nonzero()[0])) if batch["attention_mask"][row, p]]
        rows.append(states[row, places].mean(dim=0))
    return torch.stack(rows)


def test_a_router_looks_at_the_base_whatever_branches_are_live(chosen, mixed, tiny_records):
    """Statistics are of the base alone, beside a trained branch; so is what a question shows when it is answered."""
    base, adapters, strategy, (_, router) = chosen
    batch = encode(base, mixed)
    adapters.restore([], [])
    wanted = router.choose(_seen(base, router, batch))
    assert wanted.tolist() == [[1, 0], [0, 1]] * 3
    adapters.restore([random_factors(base, seed, size=1.5) for seed in (1, 2)], [], router)
    adapters.look_at(batch)
    assert torch.equal(router.weights, wanted.float())
    adapters.restore([], [])
    for mean, records in zip(strategy.state_dict()["means"], tiny_records.values(), strict=True):
        own = _seen(base, router, encode(base, records))[[row for row in range(12) if row % 4 != 3]]
        assert torch.allclose(mean.float(), own.mean(dim=0), atol=1e-5)


def test_shuffled_questions_are_chosen_for_as_before_and_answers_do_not_count(chosen, mixed):
    base, adapters, _, (_, router) = chosen
    adapters.restore([random_factors(base, seed) for seed in (1, 2)], [], router)
    adapters.look_at(encode(base, mixed))
    weights, order = router.weights, [4, 1, 0, 5, 3, 2]
    adapters.look_at(encode(base, [mixed[row] for row in order]))
    assert torch.equal(router.weights, weights[order])
    other = [replace(each, turns=(each.turns[0], Turn("assistant", "red red red blue yes"))) for each in mixed]
    for batch in (encode(base, other), base.family.question_batch([replace(e, turns=e.turns[:1]) for e in mixed])):
        adapters.look_at(batch)
        assert torch.equal(router.weights, weights)


def test_a_domain_to_come_has_no_part_in_a_router(chosen, mixed):
    base, adapters, _, (first, _) = chosen
    assert all(len(tensor) == 1 for name, tensor in first.state_dict().items() if name != "whitening")
    assert "Alpha" not in str(first.settings()) and "Beta" not in str(first.settings())
    adapters.restore([random_factors(base, 1)], [], first)
    adapters.look_at(encode(base, mixed))
    assert first.weights.shape == (6, 1)


def test_words_alone_can_route(base, tiny_records, tmp_path):
    adapters = Adapters(base, "merged", 0.0)
    context = context_of(base, adapters, tiny_records, 0)
    learn(Routed(RoutedOptions(pictures=False, samples=8)), context, tmp_path, epochs=0.5)
    text = base.model.get_input_embeddings().weight.shape[1]
    assert context.answering.settings() == {"domains": 1, "width": text, "pictures": False}
    adapters.look_at(encode(base, tiny_records["Alpha"][:2]))
    assert adapters.mixer.weights.shape == (2, 1)
