"""Equation (12) of one class list and of several, and what joins batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mllm_keeplora.models.family import inputs_of

IGNORED = -100


def fast_losses(base, batch):
    batch = {**batch, "pixel_values": batch["pixel_values"].double()}
    with base.family.supervised(base.model, batch):
        logits = base.model(**inputs_of(batch)).logits
    return base.family.losses(logits.double(), batch["labels"])


def test_batches_of_two_lists_are_the_two_apart(base, records):
    mixed = base.family.training_batch(records["Alpha"][:3] + records["Beta"][:2])
    apart = [base.family.training_batch(records["Alpha"][:3]), base.family.training_batch(records["Beta"][:2])]
    base.model.double()
    together = fast_losses(base, mixed)[0]
    torch.testing.assert_close(together, torch.cat([fast_losses(base, each)[0] for each in apart]))
    assert mixed["allowed"].sum(dim=1).tolist() == [4, 4, 4, 2, 2]
    assert not any("allowed" in each for each in apart)


def test_joined_batches_are_as_if_made_at_once(base, records):
    family = base.family
    first, second = records["Alpha"][:3], records["Beta"][:2]
    joined = family.joined(family.training_batch(first), family.training_batch(second))
    whole = family.training_batch(first + second)
    assert joined.keys() == whole.keys()
    for name, values in joined.items():
        torch.testing.assert_close(values, whole[name])
    # of one list nothing is doubled, and a third batch finds the texts of the first two
    same = family.joined(family.training_batch(first), family.training_batch(records["Alpha"][3:5]))
    assert "allowed" not in same and len(same["input_ids"]) == 4 and len(same["labels"]) == 5
    again = family.joined(joined, family.training_batch(records["Beta"][2:4]))
    assert len(again["input_ids"]) == 6 and again["allowed"].sum(dim=1).tolist() == [4, 4, 4, 2, 2, 2, 2]


def test_idle_records_carry_no_loss(base, records):
    idle = records["Alpha"][0].untrained()
    batch = base.family.training_batch([records["Alpha"][1], idle])
    assert batch["labels"][1] == IGNORED
    losses, rows = fast_losses_of_float(base, batch)
    assert rows.tolist() == [0] and losses.shape == (1,)
    joined = base.family.joined(batch, base.family.training_batch([idle]))
    assert joined["labels"].tolist()[1:] == [IGNORED, IGNORED]


def fast_losses_of_float(base, batch):
    with base.family.supervised(base.model, batch):
        return base.family.losses(base.model(**inputs_of(batch)).logits, batch["labels"])


def test_what_is_no_class_record_is_refused(base, records):
    from mllm_keeplora.errors import UserError

    record = records["Alpha"][0]
    with pytest.raises(UserError, match=r"cannot be asked '\?'.*classes"):
        base.family.training_batch([replace(record, classes=None)])
    with pytest.raises(UserError, match=r"is shown one picture, got 0"):
        base.family.training_batch([replace(record, media=())])
    other = replace(record, classes=records["Beta"][0].classes)
    with pytest.raises(UserError, match=r"label '\w+' is none of its 2 classes"):
        base.family.training_batch([other])
