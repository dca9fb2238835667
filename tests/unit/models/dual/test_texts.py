"""Texts of classes: trimmed where nothing reads what is left out, never cut, padded where a tower attends to it."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.family import inputs_of
from tests.support.tiny_dual import PLACES_TEXT


def test_causal_towers_are_trimmed_without_effect_and_others_never(base, records):
    batch = base.family.training_batch(records["Alpha"][:3])
    if base.family.texts.full:  # SigLIP attends to its padding
        assert batch["input_ids"].shape[1] == PLACES_TEXT and "attention_mask" not in batch
        return
    assert batch["input_ids"].shape[1] < PLACES_TEXT
    more = PLACES_TEXT - batch["input_ids"].shape[1]
    whole = {
        **batch,
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, more)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, more)),
    }
    logits = [base.model(**inputs_of(each)).logits_per_image for each in (batch, whole)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_padding_of_the_published_code_is_token_0_everywhere(base, records):
    padded = base.family.padded(base.family.training_batch(records["Alpha"][:3]))
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (4, PLACES_TEXT)
    assert bool(padded["attention_mask"].all()) and (padded["input_ids"][:, -1] == 0).all()
    kinds = base.family.token_kinds(base.model, padded)
    assert bool(kinds["instruction"].all())


def test_a_text_that_is_too_long_is_refused(base, records):
    from dataclasses import replace

    long = "a photo of " * PLACES_TEXT
    record = records["Alpha"][0]
    classes = ClassList.of(record.classes.names, [long + "{}"])
    with pytest.raises(UserError, match=rf"is \d+ tokens long; the base's text tower has places for {PLACES_TEXT}"):
        base.family.training_batch([replace(record, classes=classes)])
