"""Greedy decoding: tokens as `generate` gives them, though rows leave when their answers have ended."""

from __future__ import annotations

import copy

import pytest
import torch

from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.readers import read_test
from mllm_keeplora.models.causal import decoding
from mllm_keeplora.models.causal.decoding import greedy
from tests.support.tiny import write_tiny_data

PAD, ROWS, STEPS = 0, 12, 8


@pytest.fixture
def batch(base, tmp_path_factory) -> dict:
    root = write_tiny_data(tmp_path_factory.mktemp("asked"), train=1, test=ROWS, domains=("Alpha",))
    records = read_test(root / "Alpha" / "test.json", root / "Alpha")
    return base.prompt.question_batch(records, [images_of(record) for record in records])


@pytest.fixture
def widths(base) -> list[int]:
    """Rows of every forward pass."""
    seen: list[int] = []
    handle = base.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def plain(model, batch, ends, steps: int = STEPS) -> torch.Tensor:
    made = model.generate(**batch, max_new_tokens=steps, do_sample=False, eos_token_id=list(ends), pad_token_id=PAD)
    return made[:, batch["input_ids"].shape[1] :]


def ends_of(free: torch.Tensor) -> set[int]:
    """Tokens that end the rows of an unbounded answer at different steps: the commonest second and fourth."""
    return {int(free[:, 1].mode().values), int(free[:, 3].mode().values)}


def test_rows_leave_and_every_token_is_what_generate_gives(base, batch, widths):
    ends = ends_of(plain(base.model, batch, {PAD}))
    expected = plain(base.model, batch, ends)
    assert len({int((row != PAD).sum()) for row in expected}) > 1, "answers of one length would prove nothing"
    widths.clear()
    found = greedy(base.model, batch, STEPS, ends, PAD).tokens
    assert found.tolist() == expected.tolist()
    assert widths[0] == ROWS > widths[-1] and widths == sorted(widths, reverse=True)
    assert len(widths) == expected.shape[1]


def test_answers_are_the_likeliest_tokens_whatever_the_base_asks_for(base, batch, monkeypatch):
    """Qwen2.5-VL's generation_config.json, for one, has a repetition penalty."""
    expected = plain(base.model, batch, {PAD})
    for key, value in {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_length": 20}.items():
        monkeypatch.setattr(base.model.generation_config, key, value)
    assert plain(base.model, batch, {PAD}).tolist() != expected.tolist()
    assert greedy(base.model, batch, STEPS, {PAD}, PAD).tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_no_answer_is_longer_than_allowed(steps, base, batch):
    ends = ends_of(plain(base.model, batch, {PAD}))
    assert greedy(base.model, batch, steps, ends, PAD).tokens.tolist() == plain(base.model, batch, ends, steps).tolist()


def test_tokens_of_a_question_do_not_depend_on_its_company(base, batch):
    ends = ends_of(plain(base.model, batch, {PAD}))
    whole = greedy(base.model, batch, STEPS, ends, PAD).tokens
    for row in range(ROWS):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        [alone] = greedy(base.model, one, STEPS, ends, PAD).tokens
        assert whole[row, : len(alone)].tolist() == alone.tolist()
        assert whole[row, len(alone) :].eq(PAD).all()


def test_all_rows_stay_where_they_cannot_be_told_apart(base, batch, widths, monkeypatch):
    ends = ends_of(plain(base.model, batch, {PAD}))
    expected = plain(base.model, batch, ends)
    widths.clear()
    monkeypatch.setattr(decoding, "_rows_may_leave", lambda *given: False)
    assert greedy(base.model, batch, STEPS, ends, PAD).tokens.tolist() == expected.tolist()
    assert set(widths) == {ROWS}


def test_rows_may_not_leave_hybrid_or_cross_attending_bases(base, batch, monkeypatch):
    assert decoding._rows_may_leave(base.model, batch)
    assert not decoding._rows_may_leave(base.model, {**batch, "cross_attention_mask": batch["attention_mask"]})
    text = base.model.config.get_text_config()
    monkeypatch.setattr(text, "layer_types", ["full_attention", "linear_attention"], raising=False)
    assert not decoding._rows_may_leave(base.model, batch)


@pytest.mark.parametrize("leaving", [True, False])
def test_close_calls_are_those_where_two_tokens_of_an_answer_differ_by_rounding(base, batch, monkeypatch, leaving):
    """Against the logits that `generate` gives out; what comes behind an end does not count."""
    ends = ends_of(plain(base.model, batch, {PAD}))
    given = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": list(ends), "pad_token_id": PAD}
    made = base.model.generate(**batch, **given, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(made.logits, dim=1).topk(2).values  # (ROWS, steps, 2)
    leads = (best[..., 0] - best[..., 1]) / best[..., 0].abs()
    ended = torch.isin(made.sequences[:, batch["input_ids"].shape[1] :], torch.tensor(sorted(ends)))
    behind = ended.cumsum(1) - ended.long() > 0
    within = leads.masked_fill(behind, torch.inf).amin(1)
    limit = float(within.median()) * (1 + 1e-3)
    assert (leads.amin(1) <= limit).sum() > (within <= limit).sum() > 0, (
        "a close call behind an end is part of the test"
    )
    monkeypatch.setattr(decoding, "ROUNDING", limit)
    monkeypatch.setattr(decoding, "_rows_may_leave", lambda *given: leaving)
    assert greedy(base.model, batch, STEPS, ends, PAD).close.tolist() == (within <= limit).tolist()


def test_half_precision_has_coarser_close_calls(base):
    assert decoding._rounding(base.model) == decoding.ROUNDING
    assert decoding._rounding(copy.deepcopy(base.model).bfloat16()) == torch.finfo(torch.bfloat16).eps
