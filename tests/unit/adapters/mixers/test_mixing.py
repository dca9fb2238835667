"""Live branches weighed by a mixer: the same as merging where weights are ones, one branch a row where they are."""

import pytest
import torch

from mllm_keeplora.adapters import Branch, mixers
from mllm_keeplora.adapters.mixers.mixing import keep_rows, look_at, mixer_of
from mllm_keeplora.models.causal.decoding import greedy
from tests.support.mixing import Given
from tests.unit.adapters.conftest import ABSENT, HISTORIES, adapt, branch_of, random_branch, random_factors, same
from tests.unit.conftest import logits_of


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(mixers.MIXERS, "given", "tests.support.mixing:Given")


def one_hot(*chosen, parts=3):
    mixer = Given(parts, len(chosen))
    mixer.table.data = torch.nn.functional.one_hot(torch.tensor(chosen), parts).float()
    return mixer


def history(base):
    return [random_factors(base, seed, without=(ABSENT,) if seed == 1 else ()) for seed in range(3)]


def rows_of(batch, rows):
    """Some conversations of a batch; each has one picture."""
    return {name: value[rows] for name, value in batch.items()}


def live_logits(adapters, batch):
    adapters.look_at(batch)
    return logits_of(adapters.model, batch)


@pytest.mark.parametrize("mode", HISTORIES)
def test_live_branches_of_weight_one_give_the_logits_of_their_sum(base, batch, mode):
    adapters = adapt(base, mode)
    adapters.restore(history(base), [])
    summed = logits_of(adapters.model, batch)
    adapters.restore(history(base), [], Given(3))
    assert torch.allclose(live_logits(adapters, batch), summed, atol=1e-4)
    assert mixer_of(adapters.model) is adapters.mixer


def test_each_row_is_answered_by_the_branch_that_weighs_one_for_it(base, batch):
    adapters = adapt(base)
    alone = []
    for factors in history(base):
        adapters.restore([factors], [])
        alone.append(logits_of(adapters.model, batch))
    adapters.restore(history(base), [], one_hot(2, 0, 1, 1))
    found = live_logits(adapters, batch)
    for row, chosen in enumerate((2, 0, 1, 1)):
        assert torch.allclose(found[row], alone[chosen][row], atol=1e-4)
        assert not torch.allclose(found[row], alone[(chosen + 1) % 3][row], atol=1e-2)


def test_pictures_are_dealt_out_to_the_questions_that_have_them(base, tiny_records):
    """The projector sees pictures, not questions: here none, two and one of them."""
    from dataclasses import replace

    from mllm_keeplora.data.schema import Turn
    from tests.unit.conftest import encode

    first, second, third = (tiny_records["Alpha"][number] for number in range(3))
    mute = replace(first, media=(), turns=(Turn("user", "red ?"), Turn("assistant", "green")))
    both = replace(second, media=(*second.media, *third.media))
    batch = encode(base, [mute, both, third])
    adapters = adapt(base)
    alone = []
    for factors in history(base):
        adapters.restore([factors], [])
        alone.append(logits_of(adapters.model, batch))
    adapters.restore(history(base), [], one_hot(0, 1, 2))
    found = live_logits(adapters, batch)
    assert all(torch.allclose(found[row], alone[row][row], atol=1e-4) for row in range(3))


def test_a_batch_that_was_not_looked_at_is_never_run_on(base, batch):
    adapters = adapt(base)
    adapters.restore(history(base), [], one_hot(2, 0, 1, 1))
    with pytest.raises(RuntimeError, match="has not looked at"):
        logits_of(adapters.model, batch)
    adapters.look_at(rows_of(batch, [1, 0, 2, 3]))
    with pytest.raises(RuntimeError, match="has not looked at"):
        logits_of(adapters.model, batch)
    adapters.restore(history(base), [])
    logits_of(adapters.model, batch)


def test_answers_in_a_batch_are_those_of_each_question_alone(base, batch):
    """Rows leave a batch when their answer has ended; the others keep their own weights."""
    adapters = adapt(base)
    chosen = (2, 0, 1, 1)

    def answers(mixer, rows):
        adapters.restore([random_factors(base, seed, size=1.5) for seed in range(3)], [], mixer)
        asked = {name: value for name, value in rows_of(batch, rows).items() if name != "labels"}
        asked["attention_mask"] = torch.ones_like(asked["attention_mask"])
        look_at(adapters.base, asked)
        with torch.inference_mode():
            return greedy(adapters.model, asked, 8, range(0, 8), 0, keep_rows(adapters.base)).tokens

    together = answers(one_hot(*chosen), [0, 1, 2, 3])
    for row, part in enumerate(chosen):
        alone = answers(one_hot(part), [row])
        assert torch.equal(alone[0], together[row, : alone.shape[1]])
    lengths = {int((answer != 0).sum()) for answer in together}
    assert len(lengths) > 1, "some answers end before others, or this shows nothing"


@pytest.mark.parametrize("mode", HISTORIES)
def test_opening_a_branch_with_a_mixer_changes_nothing_and_trains_what_is_stated(base, batch, mode):
    adapters = adapt(base, mode)
    adapters.restore(history(base), [])
    before = logits_of(adapters.model, batch)
    branch = random_branch(base, 9)
    branch.mixer = Given(4)
    adapters.open(branch)
    assert torch.allclose(live_logits(adapters, batch), before, atol=1e-4)
    assert "base_model.model.branch_mixer.table" in adapters.trainable()
    adapters.assert_plan()
    adapters.load(random_factors(base, 10), {})
    adapters.look_at(batch)
    adapters.model(**{key: value for key, value in batch.items() if key != "labels"}).logits.square().mean().backward()
    assert (adapters.mixer.table.grad != 0).all()
    adapters.restore(history(base), [])
    assert adapters.mixer is None and mixer_of(adapters.model) is None
    assert torch.allclose(logits_of(adapters.model, batch), before, atol=1e-5)


def test_a_branch_keeps_its_mixer_on_disk(base, tmp_path):
    branch = random_branch(base, 9)
    branch.mixer = one_hot(2, 0, 1)
    branch.save(tmp_path / "init.safetensors")
    loaded = Branch.load(tmp_path / "init.safetensors")
    assert torch.equal(loaded.mixer.table, branch.mixer.table) and loaded.mixer.settings() == branch.mixer.settings()
    assert same(loaded.A, branch.A) and not loaded.carried


# -- carried branches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", HISTORIES)
def test_a_carried_branch_stands_in_place_of_the_past(base, batch, mode):
    adapters = adapt(base, mode)
    last = random_factors(base, 1)
    adapters.restore([last], [])
    before = logits_of(adapters.model, batch)
    adapters.open(Branch(last.A, last.alpha, ("A", "B"), last.B, carried=True))
    assert torch.allclose(logits_of(adapters.model, batch), before, atol=1e-4)
    read = adapters.read()
    assert same(read.A, last.A) and same(read.B, last.B)


@pytest.mark.parametrize("mode", HISTORIES)
def test_the_teacher_of_a_carried_branch_is_its_start(base, batch, mode):
    adapters = adapt(base, mode)
    last, later = random_factors(base, 1), random_factors(base, 2)
    adapters.restore([last], [])
    before = logits_of(adapters.model, batch)
    adapters.open(Branch(last.A, last.alpha, ("A", "B"), last.B, carried=True))
    adapters.load(later, {})
    after = logits_of(adapters.model, batch)
    with adapters.closed():
        assert torch.allclose(logits_of(adapters.model, batch), before, atol=1e-4)
    assert torch.equal(logits_of(adapters.model, batch), after)
    adapters.assert_plan()


def test_shares_of_a_carried_branch_are_weighed_apart(base, batch):
    adapters = adapt(base)
    ranks = {layer: 4 for layer in base.parts.target_layers}
    A = {layer: torch.randn(ranks[layer], base.model.get_submodule(layer).in_features) / 4 for layer in ranks}
    B = {layer: 0.3 * torch.randn(base.model.get_submodule(layer).out_features, 4) for layer in ranks}
    alpha = dict.fromkeys(A, 4.0)
    half = branch_of(random_factors(base, 1))
    half.A = {layer: each[2:] for layer, each in A.items()}
    half.alpha, half.train, half.carried = dict.fromkeys(A, 2.0), ("A", "B"), True
    half.B = {layer: each[:, 2:] for layer, each in B.items()}
    adapters.open(half)
    wanted = logits_of(adapters.model, batch)
    adapters.restore([], [])
    mixer = Given(2, shares=2)
    mixer.table.data = torch.tensor([0.0, 1.0])
    adapters.open(Branch(A, alpha, ("A", "B"), B, carried=True, mixer=mixer))
    assert torch.allclose(live_logits(adapters, batch), wanted, atol=1e-4)
