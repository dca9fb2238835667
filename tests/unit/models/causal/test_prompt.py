"""The prompt: which tokens carry loss, by ids written out by hand from the tiny tokenizer's word list."""

import copy
from pathlib import Path

import pytest
import torch

from mllm_keeplora.data import Media, Record
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import IGNORED, ChatPrompt
from tests.support.tiny import SIDE

PAD, BOS, EOS, IMAGE = 0, 1, 2, 4
USER, ASSISTANT = [12, 13], [14, 13]  # "user :", "assistant :"
COLOUR = [5, 6, 7, 8, 9, 11]  # "what colour is the square ?"
WHERE = [10, 7, 8, 9, 11]  # "where is the square ?"
RED, LEFT, YES, NO = 17, 21, 15, 16
IMAGES = [IMAGE] * 4  # 2 x 2 patches, the class token is not used

ONE_TURN = [BOS, *USER, *IMAGES, *COLOUR, *ASSISTANT, RED, EOS]
TWO_TURNS = [*ONE_TURN, *USER, *WHERE, *ASSISTANT, LEFT, EOS]


def picture():
    from PIL import Image

    return Image.new("RGB", (SIDE, SIDE), (200, 40, 40))


PICTURE = Media("image", Path("p.png"))


def record(*texts, images=1):
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))
    return Record("r", (PICTURE,) * images, turns, origin="file.json record 7")


ONE = record("what colour is the square ?", "red")
TWO = record("what colour is the square ?", "red", "where is the square ?", "left")


@pytest.fixture
def prompt(new_base):
    return new_base().prompt


def with_template(prompt, old, new):
    """A prompt whose template has `old` replaced by `new`."""
    processor = copy.deepcopy(prompt.processor)
    assert old in processor.chat_template
    processor.chat_template = processor.chat_template.replace(old, new)
    return ChatPrompt(processor)


def labelled(ids, *answers):
    """Labels of a row: IGNORED but for the given positions."""
    return [token if position in answers else IGNORED for position, token in enumerate(ids)]


def test_labels_are_the_answer_tokens_and_the_end_mark(prompt):
    batch = prompt.training_batch([ONE], [[picture()]], None)
    assert batch["input_ids"].tolist() == [ONE_TURN]
    assert batch["labels"].tolist() == [[IGNORED] * 15 + [RED, EOS]]
    assert batch["attention_mask"].tolist() == [[1] * 17]
    assert batch["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_every_assistant_turn_carries_loss_and_nothing_else_does(prompt):
    batch = prompt.training_batch([TWO], [[picture()]], None)
    assert batch["input_ids"].tolist() == [TWO_TURNS]
    assert batch["labels"].tolist() == [labelled(TWO_TURNS, 15, 16, 26, 27)]
    assert [token for token in batch["labels"][0].tolist() if token != IGNORED] == [RED, EOS, LEFT, EOS]


def test_an_answer_of_several_tokens_carries_loss_in_full(prompt):
    batch = prompt.training_batch([record("where is ?", "yes the red square")], [[picture()]], None)
    assert [token for token in batch["labels"][0].tolist() if token != IGNORED] == [YES, 8, RED, 9, EOS]


def test_a_question_that_repeats_the_answer_carries_no_loss(prompt):
    ids = [BOS, *USER, *IMAGES, 7, 8, RED, 11, *ASSISTANT, RED, EOS]  # "is the red ?" "red"
    batch = prompt.training_batch([record("is the red ?", "red")], [[picture()]], None)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labelled(ids, 13, 14)]


def test_training_batches_are_padded_on_the_right_and_padding_carries_no_loss(prompt):
    batch = prompt.training_batch([ONE, TWO], [[picture()], [picture()]], None)
    filled = [*ONE_TURN, *[PAD] * 11]
    assert batch["input_ids"].tolist() == [filled, TWO_TURNS]
    assert batch["attention_mask"].tolist() == [[1] * 17 + [0] * 11, [1] * 28]
    assert batch["labels"].tolist() == [labelled(filled, 15, 16), labelled(TWO_TURNS, 15, 16, 26, 27)]


def test_questions_are_padded_on_the_left_and_end_open_for_an_answer(prompt):
    short = Record("s", (PICTURE,), (Turn("user", "where is ?"),), "left")
    long = Record("l", (PICTURE,), (Turn("user", "what colour is the square ?"),), "red")
    batch = prompt.question_batch([short, long], [[picture()], [picture()]])
    expected = [
        [PAD, PAD, PAD, BOS, *USER, *IMAGES, 10, 7, 11, *ASSISTANT],
        [BOS, *USER, *IMAGES, *COLOUR, *ASSISTANT],
    ]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[0] * 3 + [1] * 12, [1] * 15]
    assert "labels" not in batch


def test_a_question_is_what_training_showed_before_the_answer(prompt):
    question = prompt.question_batch([ONE], [[picture()]])["input_ids"][0].tolist()
    assert question == ONE_TURN[: len(question)] and ONE_TURN[len(question) :] == [RED, EOS]


def test_a_suffix_is_appended_to_the_question(prompt):
    batch = prompt.question_batch([ONE], [[picture()]], suffixes=[" yes no"])
    assert batch["input_ids"].tolist() == [[BOS, *USER, *IMAGES, *COLOUR, YES, NO, *ASSISTANT]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_image_takes_four_tokens_before_the_question(prompt, count):
    several = record("what colour is the square ?", "red", "where is the square ?", "left", images=count)
    batch = prompt.training_batch([several], [[picture()] * count], None)
    assert (batch["input_ids"] == IMAGE).sum() == 4 * count == 4 * batch["pixel_values"].shape[0]
    ids = [BOS, *USER, *IMAGES * count, *TWO_TURNS[7:]]
    shift = 4 * (count - 1)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labelled(ids, *(shift + place for place in (15, 16, 26, 27)))]


def test_records_without_images_need_none(prompt):
    batch = prompt.training_batch([record("where is ?", "left", images=0)], [[]], None)
    ids = [BOS, *USER, 10, 7, 11, *ASSISTANT, LEFT, EOS]
    assert batch["input_ids"].tolist() == [ids] and "pixel_values" not in batch
    assert batch["labels"].tolist() == [labelled(ids, 8, 9)]


def test_records_with_and_without_images_share_a_batch(prompt):
    blind = record("where is ?", "left", images=0)
    batch = prompt.training_batch([blind, ONE], [[], [picture()]], None)
    assert batch["pixel_values"].shape[0] == 1
    assert batch["input_ids"][1].tolist() == ONE_TURN
    assert [token for token in batch["labels"][0].tolist() if token != IGNORED] == [LEFT, EOS]


def test_a_record_longer_than_allowed_is_refused_with_its_place_and_length(prompt):
    pictures = [[picture()], [picture()]]
    assert prompt.training_batch([ONE, TWO], pictures, 28)["labels"].shape == (2, 28)
    with pytest.raises(UserError, match=r"file\.json record 7: 28 tokens, train\.max_length allows 27"):
        prompt.training_batch([ONE, TWO], pictures, 27)


def test_answers_are_texts_without_marks_in_the_order_of_the_batch(prompt):
    tokens = torch.tensor([[RED, EOS, PAD], [8, LEFT, 9], [EOS, PAD, PAD]])
    assert prompt.answers(tokens) == ["red", "the left square", ""]


def test_length_counts_text_and_grows_with_the_question(prompt):
    assert prompt.length(ONE) == len([BOS, *USER, IMAGE, *COLOUR, *ASSISTANT])
    assert prompt.length(record("where is ?", "left")) < prompt.length(ONE)


def test_a_template_that_marks_only_the_last_turn_is_refused(prompt):
    broken = with_template(prompt, "' ' + eos_token", "' ' + (eos_token if loop.last else '')")
    assert broken.training_batch([ONE], [[picture()]], None)["labels"].tolist() == [labelled(ONE_TURN, 15, 16)]
    with pytest.raises(UserError, match="record 7: the chat template is not the same for a prefix"):
        broken.training_batch([TWO], [[picture()]], None)


def test_a_template_that_opens_answers_otherwise_than_it_writes_them_is_refused(prompt):
    broken = with_template(prompt, "' assistant :'", "' assistant : yes'")
    with pytest.raises(UserError, match="not the same for a prefix"):
        broken.training_batch([ONE], [[picture()]], None)


def test_a_template_that_drops_the_answer_is_refused(prompt):
    broken = with_template(
        prompt, "{% for m in messages %}", "{% for m in messages if m['role'] == 'user' or add_generation_prompt %}"
    )
    with pytest.raises(UserError, match="record 7"):
        broken.training_batch([ONE], [[picture()]], None)


def test_a_processor_without_a_template_is_refused(prompt):
    processor = copy.deepcopy(prompt.processor)
    processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatPrompt(processor)


# -- images in later turns, turns without loss, the published prompt ---------------------------------------------


def talk(*turns, images):
    return Record("r", (PICTURE,) * images, turns, origin="file.json record 7")


def test_an_image_in_a_later_turn_moves_only_what_follows_it(prompt):
    later = talk(
        Turn("user", "what colour is the square ?"), Turn("assistant", "red"),
        Turn("user", "<image>where is the square ?"), Turn("assistant", "left"), images=1,
    )  # fmt: skip
    batch = prompt.training_batch([later], [[picture()]], None)
    first = [BOS, *USER, *COLOUR, *ASSISTANT]
    ids = [*first, RED, EOS, *USER, *IMAGES, *WHERE, *ASSISTANT, LEFT, EOS]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labelled(ids, len(first), len(first) + 1, len(ids) - 2, len(ids) - 1)]


def test_images_before_the_first_answer_may_take_other_tokens_together_than_alone(prompt, monkeypatch):
    """As LLaVA-OneVision's do: what each takes alone is not asked for, since all come before the first answer."""
    two = talk(Turn("user", "<image><image>what colour is the square ?"), Turn("assistant", "red"), images=2)
    plain = prompt.training_batch([two], [[picture(), picture()]], None)
    monkeypatch.setattr(prompt, "_widening", lambda sizes: 99)
    assert prompt.training_batch([two], [[picture(), picture()]], None)["labels"].tolist() == plain["labels"].tolist()
    later = talk(*two.turns, Turn("user", "<image>where is the square ?"), Turn("assistant", "left"), images=3)
    with pytest.raises(UserError, match=r"^file.json record 7: 3 images take \d+ tokens together, 297 alone$"):
        prompt.training_batch([later], [[picture()] * 3], None)


def test_images_in_both_turns_leave_exactly_the_answers_trained(prompt):
    both = talk(
        Turn("user", "<image>what colour is the square ?"), Turn("assistant", "red"),
        Turn("user", "<image>where is the square ?"), Turn("assistant", "left"), images=2,
    )  # fmt: skip
    batch = prompt.training_batch([both], [[picture(), picture()]], None)
    trained = batch["input_ids"][batch["labels"] != IGNORED].tolist()
    assert trained == [RED, EOS, LEFT, EOS] and prompt.trained_tokens(both) == 4
    assert prompt.total_tokens(both, [(SIDE, SIDE)] * 2) == batch["input_ids"].shape[1]


def test_an_answer_whose_loss_is_off_is_not_trained(prompt):
    quiet = talk(
        Turn("user", "what colour is the square ?"), Turn("assistant", "red", trained=False),
        Turn("user", "where is the square ?"), Turn("assistant", "left"), images=1,
    )  # fmt: skip
    batch = prompt.training_batch([quiet], [[picture()]], None)
    assert batch["input_ids"][batch["labels"] != IGNORED].tolist() == [LEFT, EOS]


def test_a_turn_that_would_train_nothing_is_an_error(prompt):
    endless = with_template(prompt, "{{ ' ' + eos_token }}", "")
    empty = record("where is ?", "left", "what colour is ?", "")
    with pytest.raises(UserError, match=r"file\.json record 7: turn 3, an answer, has no token"):
        endless.training_batch([empty], [[picture()]], None)
    assert prompt.trained_tokens(empty) == 3  # with an end mark the silence itself is learnt


def test_answers_may_end_in_a_mark_that_only_the_generation_config_names(prompt):
    other = ChatPrompt(prompt.processor, ends=[YES])
    assert other.ends == {EOS, YES}


def test_a_template_without_end_mark_is_noticed(prompt):
    endless = with_template(prompt, "{{ ' ' + eos_token }}", "")
    assert prompt.ends_answers(TWO) and not endless.ends_answers(TWO)
