"""Zero-shot answers: ties, several lists of classes at once, and how often texts are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mllm_keeplora.data.classes import ClassList


def asked(base, records, ensemble=False):
    batch = base.family.question_batch(records)
    with torch.inference_mode(), base.family.asking(ensemble):
        return base.family.answers(base.model, batch, 1, lambda rows: None)


def test_a_near_tie_is_told_and_one_class_is_sure(base, records):
    record = records["Alpha"][0]
    same = replace(record, classes=ClassList(("red", "green"), (("the red square",), ("the red square",))))
    alone = replace(record, classes=ClassList(("red",), (("the red square",),)))
    tie, sure = asked(base, [same])[0], asked(base, [alone])[0]
    assert tie.is_close and tie.probability == pytest.approx(0.5)
    assert not sure.is_close and sure.probability == 1.0 and sure.second is None


def test_questions_of_several_lists_are_answered_from_their_own(base, records):
    answers = asked(base, [records["Alpha"][0], records["Beta"][0], records["Alpha"][1]])
    for answer, name in zip(answers, ("Alpha", "Beta", "Alpha"), strict=True):
        assert answer.text in records[name][0].classes.names


def test_texts_are_read_once_a_set(base, records, monkeypatch):
    read = []
    own = base.model.get_text_features
    monkeypatch.setattr(base.model, "get_text_features", lambda **inputs: read.append(1) or own(**inputs))
    with torch.inference_mode(), base.family.asking(False):
        for record in records["Alpha"][:4]:
            base.family.answers(base.model, base.family.question_batch([record]), 1, lambda rows: None)
    assert len(read) == 1
