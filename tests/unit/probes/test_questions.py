"""What questions give each target layer: token by token, one record at a time, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mllm_keeplora.data.schema import Turn
from mllm_keeplora.models import IGNORED
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.probes.questions import question_means
from tests.oracles import dac as oracle
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
