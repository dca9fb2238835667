"""Equation (12) against a plain loop in float64, of one class list and of several, and what joins batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mllm_keeplora.models.family import inputs_of

IGNORED = -100


def slow_losses(base, records):
    """Loss of every record as the equation says it, in float64: each picture and each text alone."""
    model, texts, found = base.model, base.family.texts, []
    for record in records:
        pixels = base.family.training_batch([record])["pixel_values"].double()
        seen = model.vision_model(pixel_values=pixels).pooler_output[0]
        seen = model.visual_projection(seen) if hasattr(model, "visual_projection") else seen
        logits = []
        for own in record.classes.texts:
            said = model.text_model(**texts.tokens([own[0]])).pooler_output[0]
            said = model.text_projection(said) if hasattr(model, "text_projection") else said
            logits.append(model.logit_scale.exp().squeeze() * (seen @ said) / seen.norm() / said.norm())
        place = record.classes.names.index(record.turns[-1].text)
        found.append(torch.logsumexp(torch.stack(logits), 0) - logits[place])
    return torch.stack(found)


def fast_losses(base, batch):
    batch = {**batch, "pixel_values": batch["pixel_values"].double()}
    with base.family.supervised(base.model, batch):
        logits = base.model(**inputs_of(batch)).logits
    return base.family.losses(logits.double(), batch["labels"])


def gradients(losses, model):
    names = [name for name, _ in model.named_parameters() if name.endswith("q_proj.weight")]
    weights = [model.get_parameter(name) for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    return dict(zip(names, torch.autograd.grad(losses(), weights), strict=True))


@pytest.mark.parametrize("mixed", [False, True])
def test_losses_and_gradients_of_both_towers_are_those_of_a_plain_loop(base, records, mixed):
    base.model.double()
    some = records["Alpha"][:5] + (records["Beta"][:4] if mixed else [])
    slow, (fast, rows) = slow_losses(base, some), fast_losses(base, base.family.training_batch(some))
    assert rows.tolist() == list(range(len(some)))
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)  # float32 in the cross entropy
    wanted = gradients(lambda: slow_losses(base, some).sum(), base.model)
    found = gradients(lambda: fast_losses(base, base.family.training_batch(some))[0].sum(), base.model)
    assert {name.split(".")[0] for name in found} == {"vision_model", "text_model"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6 * float(wanted[name].abs().max()))


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
