"""Zero-shot answers: the nearest class, its probability, ties, and classes told by several texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.models.family import inputs_of


def asked(base, records, ensemble=False):
    batch = base.family.question_batch(records)
    with torch.inference_mode(), base.family.asking(ensemble):
        return base.family.answers(base.model, batch, 1, lambda rows: None)


def test_answers_are_the_likeliest_by_the_models_own_logits(base, records):
    some = records["Alpha"][:6]
    with torch.no_grad():
        shares = base.model(**inputs_of(base.family.training_batch(some))).logits_per_image.softmax(dim=1)
    for answer, own in zip(asked(base, some), shares, strict=True):
        order = own.argsort(descending=True).tolist()
        assert (answer.text, answer.second) == tuple(some[0].classes.names[place] for place in order[:2])
        assert answer.probability == pytest.approx(float(own.max()), rel=1e-4)


def test_an_ensemble_is_the_mean_of_unit_texts(base, records):
    """Against a loop in float64."""
    base.model.double()
    record = records["Alpha"][0]
    pixels = base.family.question_batch([record])["pixel_values"].double()
    with torch.no_grad():
        seen = normalize(projected(base.model.get_image_features(pixel_values=pixels)), dim=-1)[0]
        said = []
        for texts in record.classes.texts:
            each = [projected(base.model.get_text_features(**base.family.texts.tokens([text])))[0] for text in texts]
            said.append(normalize(sum(row / row.norm() for row in each) / len(each), dim=0))
        shares = (base.model.logit_scale.exp() * torch.stack(said) @ seen).softmax(0)
    base.model.float()
    [answer] = asked(base, [record], ensemble=True)
    assert answer.probability == pytest.approx(float(shares.max()), rel=1e-4)
    assert answer.text == record.classes.names[int(shares.argmax())]


def projected(output):
    return getattr(output, "pooler_output", output)


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
