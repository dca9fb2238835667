"""What frozen parts see in a question depends on the question alone: no padding, no answer, no company."""

from dataclasses import replace

import pytest
import torch

from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.models.causal.features import feature_sizes, final_states, prompt_features
from tests.unit.adapters.conftest import adapt, random_factors
from tests.unit.conftest import encode


def test_features_of_a_question_are_the_same_alone_and_in_company(base, tiny_records):
    records = tiny_records["Alpha"][:4]
    together = prompt_features(base.model, encode(base, records))
    for row, record in enumerate(records):
        assert torch.allclose(prompt_features(base.model, encode(base, [record]))[0], together[row], atol=1e-6)
    assert together.shape == (4, sum(feature_sizes(base.model)))


def test_an_answer_does_not_change_them_nor_does_the_side_of_the_padding(base, tiny_records):
    """Training pads on the right and has answers; questions are padded on the left and have none."""
    records = tiny_records["Alpha"][:4]
    asked = [replace(record.first_exchange(), turns=record.turns[:1]) for record in records]
    questions = base.prompt.question_batch(asked, [images_of(r, base.prompt.background) for r in asked], [""] * 4)
    found = prompt_features(base.model, encode(base, records))
    assert torch.allclose(prompt_features(base.model, questions), found, atol=1e-6)


def test_words_are_the_mean_embedding_of_the_instruction(base, tiny_records):
    [record] = tiny_records["Alpha"][:1]
    batch = encode(base, [record])
    tokens, stop = batch["input_ids"][0], int((batch["labels"][0] != -100).nonzero()[0])
    words = [int(t) for t in tokens[:stop] if t != base.model.config.image_token_id and t != 0]
    table = base.model.get_input_embeddings().weight.double()
    wanted = sum(table[t] for t in words) / len(words)
    assert torch.allclose(prompt_features(base.model, batch, pictures=False)[0].double(), wanted, atol=1e-6)


def test_pictures_go_to_the_questions_that_show_them(base, tiny_records):
    first, second, third = tiny_records["Alpha"][:3]
    mute = replace(first, media=(), turns=(Turn("user", "red ?"), Turn("assistant", "green")))
    both = replace(second, media=(*second.media, *third.media))
    width = feature_sizes(base.model)[0]
    none, two, one, other = prompt_features(base.model, encode(base, [mute, both, second, third]))[:, width:]
    assert not none.any() and torch.allclose(two, (one + other) / 2, atol=1e-6) and not torch.allclose(one, other)


@pytest.mark.parametrize("pictures", [True, False])
def test_final_states_are_the_mean_of_what_the_head_receives_at_a_question(base, tiny_records, pictures):
    """Of its tokens alone: no padding on either side, no answer, and those of pictures only if asked."""
    records = tiny_records["Alpha"][:4]
    found = final_states(base.model, encode(base, records), pictures)
    for row, record in enumerate(records):
        batch = encode(base, [record])
        stop, tokens = int((batch["labels"][0] != -100).nonzero()[0]), batch["input_ids"][0]
        told = {name: value for name, value in batch.items() if name != "labels"}
        states = base.model(**told, output_hidden_states=True).hidden_states[-1][0].double()
        places = [p for p in range(stop) if pictures or tokens[p] != base.model.config.image_token_id]
        assert torch.allclose(found[row].double(), states[places].mean(dim=0), atol=1e-5)
    asked = [replace(record.first_exchange(), turns=record.turns[:1]) for record in records]
    assert torch.allclose(final_states(base.model, base.family.question_batch(asked), pictures), found, atol=1e-5)
    assert found.shape == (4, feature_sizes(base.model)[0]) and not found.requires_grad


def test_nothing_that_is_trained_changes_them(base, tiny_records):
    batch = encode(base, tiny_records["Alpha"][:3])
    before = prompt_features(base.model, batch)
    adapt(base).restore([random_factors(base, 1)], [])
    assert torch.equal(prompt_features(base.model, batch), before)
