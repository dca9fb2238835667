"""What questions give each target layer: token by token, one record at a time, in float64."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.models import IGNORED, load_base
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.probes.questions import question_means
from tests.oracles import dac as oracle
from tests.support.tiny import COLOURS
from tests.support.tiny_dual import write_class_data, write_tiny_clip
from tests.unit.conftest import encode


def means_of(base, batch):
    return question_means(base.family, base.model, base.parts.target_layers, base.parts.projectors, batch)


def inputs(base, batch):
    """Input of each target layer in one run."""
    seen = {}
    hooks = [
        base.model.get_submodule(layer).register_forward_pre_hook(lambda m, args, n=layer: seen.update({n: args[0]}))
        for layer in base.parts.target_layers
    ]
    with torch.no_grad():
        base.model.eval()(**inputs_of(batch))
    for hook in hooks:
        hook.remove()
    return {layer: each.double().numpy() for layer, each in seen.items()}


def is_projector(base, layer):
    return layer.startswith(base.parts.projectors)


def test_every_layer_gets_the_mean_of_what_no_answer_reaches(base, tiny_records):
    records = tiny_records["Alpha"][:4]
    together = means_of(base, encode(base, records))
    assert together.keys() == set(base.parts.target_layers) and any(is_projector(base, each) for each in together)
    for row, record in enumerate(records):
        batch = encode(base, [record])
        answered = (batch["labels"][0] != IGNORED).nonzero()[0, 0]
        counts = [0 < place < answered for place in range(len(batch["labels"][0]))]
        for layer, x in inputs(base, batch).items():
            rows = x.reshape(-1, x.shape[-1])
            wanted = oracle.prompt_mean(rows, [True] * len(rows) if is_projector(base, layer) else counts)
            means, may = together[layer]
            assert np.allclose(means[row], wanted, atol=1e-5) and may.tolist() == [True] * 4, layer


def test_neither_answers_nor_later_questions_change_a_mean(base, tiny_records):
    record = next(each for each in tiny_records["Alpha"] if len(each.turns) == 4)
    other = replace(record, turns=(*record.turns[:1], Turn("assistant", "left left red")))
    found, wanted = (means_of(base, encode(base, [each])) for each in (record, other))
    for layer, (means, _) in found.items():
        assert torch.allclose(means, wanted[layer][0], atol=1e-6), layer
    asked = means_of(base, encode(base, [replace(record, turns=(Turn("user", "green ?"), *record.turns[1:]))]))
    assert all(
        is_projector(base, layer) or not torch.allclose(means, asked[layer][0], atol=1e-4)
        for layer, (means, _) in found.items()
    )


def test_a_shuffled_batch_has_the_same_means_in_that_order(base, tiny_records):
    records = [*tiny_records["Alpha"][:3], *tiny_records["Beta"][:3]]
    order = [4, 0, 5, 2, 1, 3]
    found, shuffled = (means_of(base, encode(base, each)) for each in (records, [records[i] for i in order]))
    for layer, (means, _) in found.items():
        assert torch.allclose(means[order], shuffled[layer][0], atol=1e-5), layer


def test_who_carries_no_loss_or_is_not_seen_has_no_vote(base, tiny_records):
    first, second, third = tiny_records["Alpha"][:3]
    mute = replace(third, media=())
    for layer, (means, may) in means_of(base, encode(base, [first, second.untrained(), mute])).items():
        assert may.tolist() == [True, False, not is_projector(base, layer)], layer
        assert not is_projector(base, layer) or not means[2].any()
    found = means_of(base, encode(base, [mute]))
    assert found and not any(is_projector(base, layer) for layer in found)


@pytest.fixture(params=["frozen", "keeplora"])
def dual(request, tmp_path_factory):
    folder = write_tiny_clip(tmp_path_factory.mktemp("dual") / "clip")
    return load_base(BaseConfig(model=str(folder)), request.param)


def test_of_a_dual_encoder_pictures_are_asked_and_class_texts(dual, tmp_path):
    root = write_class_data(tmp_path, domains=("Alpha",)) / "Alpha"
    classes = ClassList.of(list(COLOURS), ["a photo of a {} square ."])
    rows = json.loads((root / "train.json").read_text())[:3]
    records = [
        Record(row["id"], (Media("image", root / row["image"]),), (Turn("user", "?"), Turn("assistant", row["label"])),
               origin=row["id"], classes=classes)
        for row in rows
    ]  # fmt: skip
    batch = dual.family.training_batch([*records[:2], records[2].untrained()])
    counted = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
    found = means_of(dual, batch)
    assert found.keys() == set(dual.parts.target_layers)
    for layer, x in inputs(dual, batch).items():
        means, may = found[layer]
        for row in range(len(x)):
            if x.ndim == 2:
                wanted = x[row]
            elif dual.family.sees_pictures(layer):
                wanted = oracle.prompt_mean(x[row], [True] * x.shape[1])
            else:
                wanted = oracle.prompt_mean(x[row], [place > 0 and real for place, real in enumerate(counted[row])])
            assert np.allclose(means[row], wanted, atol=1e-5), layer
        wanted = [True, True, False] if dual.family.sees_pictures(layer) else [True] * len(classes.names)
        assert may.tolist() == wanted, layer
