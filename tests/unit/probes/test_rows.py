"""Which rows of a feature tensor count, position by position, against a slow loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora.models.causal.losses import token_kinds
from mllm_keeplora.probes.plans import FeaturePlan
from mllm_keeplora.probes.rows import ChosenRows
from tests.oracles import tokens as oracle

QUICK = settings(max_examples=50, deadline=None)


@st.composite
def made_up_batches(draw):
    """Batches of nothing but token ids, labels and padding on either side; id 7 is a picture's."""
    length, size = draw(st.integers(1, 14)), draw(st.integers(1, 4))
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for _ in range(size):
        padding, left = draw(st.integers(0, length - 1)), draw(st.booleans())
        mask = [0] * padding + [1] * (length - padding) if left else [1] * (length - padding) + [0] * padding
        ids = draw(st.lists(st.sampled_from([3, 4, 7]), min_size=length, max_size=length))
        answered = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        labels = [token if own and token != 7 else -100 for token, own in zip(ids, answered, strict=True)]
        for key, values in zip(batch, (ids, labels, mask), strict=True):
            batch[key].append(values)
    return batch


@QUICK
@given(
    made_up_batches(),
    st.dictionaries(st.sampled_from([oracle.IMAGE, oracle.INSTRUCTION, oracle.ANSWER]), st.integers(0, 6)),
)
def test_chosen_tokens_are_real_within_every_budget_and_evenly_spaced(batch, budgets):
    tensors = {key: torch.tensor(values) for key, values in batch.items()}
    size, length = tensors["input_ids"].shape
    places = torch.arange(size * length, dtype=torch.float32).reshape(size, length, 1)
    rows = ChosenRows(token_kinds(tensors, 7), FeaturePlan(tokens=budgets)).of(places)
    chosen = [divmod(int(place), length) for place in rows.flatten().tolist()]
    assert len(set(chosen)) == len(chosen)
    samples = oracle.positions_by_kind(batch["input_ids"], batch["labels"], batch["attention_mask"], 7)
    for number, positions in enumerate(samples):
        own = [place for row, place in chosen if row == number]
        assert len(own) == oracle.num_chosen(positions, budgets)
        for kind, available in positions.items():
            picked = sorted(set(own) & set(available))
            assert len(picked) == min(len(available), budgets.get(kind, len(available)))
            assert oracle.is_evenly_spaced(picked, available)
    assert len(chosen) == sum(oracle.num_chosen(positions, budgets) for positions in samples)


def test_a_token_without_length_is_no_reason_to_divide_by_zero():
    batch = {"attention_mask": torch.ones(1, 3, dtype=torch.long)}
    features = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 1e-20]]])
    rows = ChosenRows(token_kinds(batch, None), FeaturePlan(normalise=True)).of(features)
    assert rows.isfinite().all() and torch.allclose(rows[0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_tokens_of_texts_can_be_left_out_and_those_of_pictures_cannot(side):
    """Of the text itself, whichever side padding is on and however many tokens count."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = (mask if side == "right" else mask.flip(1)) > 0
    features = torch.arange(10.0).reshape(2, 5, 1)
    found = ChosenRows({"instruction": mask}, FeaturePlan(first=False)).of(features).flatten().tolist()
    assert found == ([1, 2, 3, 4, 6, 7] if side == "right" else [1, 2, 3, 4, 8, 9])
    few = ChosenRows({"instruction": mask}, FeaturePlan(first=False, tokens={"instruction": 2}))
    assert set(few.of(features).flatten().tolist()) <= set(found)
    assert len(ChosenRows({"image": mask}, FeaturePlan(first=False)).of(features)) == 8
