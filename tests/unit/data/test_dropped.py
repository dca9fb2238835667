"""Nothing that a record names to be shown is dropped without a word: pictures, their places, options of an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mllm_keeplora.data.formats import BY_KEYS, Fault, test_record, train_record
from mllm_keeplora.data.media.images import Looks, read_image
from mllm_keeplora.data.named import PICTURES
from mllm_keeplora.data.readers import read_test, read_train
from mllm_keeplora.data.schema import Media
from mllm_keeplora.errors import UserError

FIRST = replace(BY_KEYS, missing_marks="first")
TALK = "Here is <image> and here is <image> . Is <image> the first ?"


def talk(text: str, **row) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "no"}]
    return {"id": "0", "conversations": turns, **row}


def paths(record) -> list[str]:
    return [str(media.path) for media in record.media]


@pytest.mark.parametrize("key", PICTURES)
def test_every_known_name_of_pictures_is_read(key):
    assert paths(train_record(talk("<image>?", **{key: "a.png"}))) == ["a.png"]
    assert paths(test_record({"question_id": 1, "text": "?", "answer": "b", key: ["a.png", "b.png"]})) == [
        "a.png",
        "b.png",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file_name", "a.JPG"), ("photo", "x/a.tiff "), ("frames", ["a.png", "b.png"]), ("jpg", b"\xff\xd8"),
        ("pixels", {"bytes": b"\x89PNG", "path": None}), ("mask", [{"bytes": b"\x89PNG"}]),
    ],
)  # fmt: skip
def test_a_picture_under_an_unknown_name_is_refused_where_none_would_be_shown(key, value):
    for read, row in ((train_record, talk("?")), (test_record, {"question_id": 1, "text": "?", "answer": "b"})):
        with pytest.raises(Fault, match=rf"^{key} names a picture, .*, that would not be shown; call it `image`"):
            read({**row, key: value})
        assert read({**row, "image": None, "source": "web", "answer": "a.png"} if read is test_record else row)
    assert paths(train_record(talk("<image>?", image="a.png", **{key: value}))) == ["a.png"]


def test_two_names_of_different_pictures_are_refused():
    assert paths(train_record(talk("<image>?", image="a.png", image_path="a.png"))) == ["a.png"]
    assert paths(train_record(talk("<image>?", image="a.png", images=[]))) == ["a.png"]
    with pytest.raises(Fault, match="image and image_path name different pictures"):
        train_record(talk("<image>?", image="a.png", image_path="b.png"))


def test_pictures_named_in_the_text_are_read_where_they_stand():
    record = train_record(talk("Picture 1: <img>a.png</img>\nPicture 2: <img> b.png </img>\nSame?"))
    assert paths(record) == ["a.png", "b.png"]
    assert record.turns[0].text == "Picture 1: <image>\nPicture 2: <image>\nSame?"
    asked = test_record({"question_id": 1, "text": "Picture 1: <img>a.png</img>\nWhat?", "answer": "b"})
    assert paths(asked) == ["a.png"] and asked.turns[0].text == "Picture 1: <image>\nWhat?"
    mixed = train_record(talk("<image> and <img>b.png</img>?", images=["a.png"]))
    assert paths(mixed) == ["a.png", "b.png"] and mixed.turns[0].text == "<image> and <image>?"


@pytest.mark.parametrize("text", ['<img class="a" src="logo.png">', "![shot](docs/a.png)", "![a](https://x.org/a.jpg)"])
def test_markup_in_a_text_is_text(text):
    """Conversations about code are full of it."""
    assert train_record(talk(f"fix this: {text}")).turns[0].text == f"fix this: {text}"


def test_pictures_stand_in_the_order_of_their_marks_whatever_names_them():
    parts = [{"type": "text", "text": "<image> vs "}, {"type": "image", "image": "b.jpg"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]
    assert paths(train_record({"messages": turns, "images": ["a.jpg"]})) == ["a.jpg", "b.jpg"]
    turns[0]["content"] = [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "vs <img>c.jpg</img>"}]
    assert paths(train_record({"messages": turns})) == ["b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    "beside", [{"image_url": "http://x.org/a.jpg"}, {"img": 12}, {"picture": False}, {"image_path": "b/a.jpg"}], ids=str
)
def test_what_stands_beside_a_picture_and_is_no_other_file_is_ignored(beside):
    assert paths(train_record(talk("<image>?", image="a.jpg", **beside))) == ["a.jpg"]
    bytes_first = train_record(talk("<image>?", image={"bytes": b"x", "path": None}, **beside))
    assert bytes_first.media[0].data == b"x"


@pytest.mark.parametrize(
    "options",
    [
        {"options": 4}, {"choices": True}, {"choices": {"label": ["A", "B"], "text": ["cat", "don't know"]}},
        {"options": [{"key": "A", "value": "cat"}]}, {"options": "['cat', 'don\u2019t know']"},
        {"options": ["A. cat", "(B) don't know"]},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_the_question_shows_in_another_way_are_taken(options):
    assert train_record(talk("Which? (A) cat (B) don\u2019t know", **options))


def test_pictures_of_a_test_conversation_without_marks_come_first():
    turns = [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "no"}]
    record = test_record({"id": 1, "messages": turns, "images": ["a", "b"]})
    assert record.turns[0].text == "Same?" and paths(record) == ["a", "b"]


def test_a_row_is_read_by_the_same_shape_for_training_and_test():
    row = {"query": "long?", "response": "no", "question": "short?", "answer": "no"}
    assert train_record(row).question == test_record(row).question == "long?"


@pytest.mark.parametrize(
    "options", [{"options": ["cat", "dog"]}, {"choices": {"A": "cat", "B": "dog"}}, {"A": "cat", "B": "dog"},
                {"candidates": "(A) cat\n(B) dog"}],
)  # fmt: skip
def test_options_that_are_not_in_the_question_are_refused(options):
    for read, row in (
        (train_record, talk),
        (test_record, lambda text: {"question_id": 1, "text": text, "answer": "A"}),
    ):
        assert read({**row("Which?\n(A)  Cat\n(B) dog"), **options})
        with pytest.raises(
            Fault, match="is not in the question, so it would not be shown; write options into the text"
        ):
            read({**row("Which?\n(A) cat"), **options})


def test_empty_options_are_none():
    assert train_record(talk("?", options=[], choices=None, A="cat", C=None))


@pytest.mark.parametrize("key", ["image", "images"])
def test_several_marks_stay_where_they_stand(key):
    record = train_record(talk(TALK, **{key: ["a", "b", "c"]}))
    assert record.turns[0].text == TALK and paths(record) == ["a", "b", "c"]


def test_llava_moves_the_single_mark_of_each_turn_to_its_front():
    said = ["What is <image> ?", "a", "And <image> ?", "b", "And <image> or <image> ?", "c"]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    record = train_record({"conversations": turns, "image": ["1", "2", "3", "4"]})
    texts = [turn.text for turn in record.turns[::2]]
    assert texts == ["<image>What is  ?", "<image>And  ?", "And <image> or <image> ?"]
    alone = train_record(talk("Is it <image>\nred?", image="a.png"))
    assert alone.turns[0].text == "Is it \nred?"
    placed = train_record(talk("Is it <image>\nred?", images=["a.png"]))  # sharegpt of others: where it stands
    assert placed.turns[0].text == "Is it <image>\nred?"


def test_missing_marks_come_first_where_that_is_asked_for():
    with pytest.raises(Fault, match=r"0 <image> marks for 2 images; .*`missing_marks: first` of the domain puts them"):
        train_record(talk("Same?", images=["a", "b"]))
    record = train_record(talk("Same?", images=["a", "b"]), FIRST)
    assert record.turns[0].text == "Same?" and paths(record) == ["a", "b"]
    with pytest.raises(Fault, match=r"1 <image> marks for 2 images; each image needs one mark$"):
        train_record(talk("<image> Same?", images=["a", "b"]), FIRST)
    assert train_record(talk("Same?"), FIRST).media == ()


def test_a_table_of_questions_and_answers_is_read():
    row = {"image": b"\x89PNG", "question": "Which?", "answer": "red"}
    record = train_record(row, FIRST)
    assert record.media == (Media("image", Path(), data=b"\x89PNG"),)
    assert [turn.text for turn in record.turns] == ["Which?", "red"]
    asked = test_record({**row, "answer": ["red", "scarlet"]})
    assert asked.answer == ("red", "scarlet") and asked.question == "Which?" and len(asked.media) == 1
    assert test_record({**row, "question": "<image>\nWhich?"}).turns[0].text == "Which?"
    with pytest.raises(Fault, match="2 pictures have a place in the text, but 1 are named"):
        test_record({**row, "question": "<image> or <image>?"})


def test_rows_of_a_table_are_known_by_their_number(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"question": "Which?", "answer": "red"}] * 2))
    assert [record.id for record in read_test(tmp_path / "t.json", tmp_path)] == ["0", "1"]


def test_calls_of_tools_are_refused_by_name():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{}"}, {"role": "tool", "content": "1"}]
    with pytest.raises(Fault, match="turn 2 is of role 'tool': calls of tools are not supported"):
        train_record({"messages": turns})
    with pytest.raises(Fault, match="tools is not supported yet"):
        train_record({"messages": turns[:2], "tools": '[{"name": "look"}]'})
    assert train_record({"messages": turns[:2], "tools": "[]"})


ENTRY = {"file_name": "d.json", "formatting": "sharegpt"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([ENTRY], "must map names of data sets to their files, got list"),
        ({"d": {**ENTRY, "columns": ["messages"]}}, "columns: .* got ['messages'] .*entry of d.json"),
        ({"d": {**ENTRY, "columns": {"messages": ["m"]}}}, "columns.messages: .* got ['m']"),
        ({"d": {**ENTRY, "tags": ["role"]}}, "tags: .* got ['role']"),
        ({"d": {**ENTRY, "formatting": None}}, "formatting: .* got None"),
    ],
)
def test_a_malformed_description_of_data_is_told_in_a_sentence(told, message, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([talk("?")]))
    (tmp_path / "dataset_info.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=message.replace(".*", "\0").replace("[", r"\[").replace("\0", ".*")):
        read_train(tmp_path / "d.json", tmp_path)


def test_a_description_of_data_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"talk": talk("?")["conversations"]}]))
    told = {"d": {**ENTRY, "columns": {"messages": "talk", "tools": None}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(told), encoding="utf-8-sig")
    assert len(read_train(tmp_path / "d.json", tmp_path)) == 1


@pytest.mark.parametrize(
    ("named", "there"),
    [
        ("images/caf\u00e9.png", "images/cafe\u0301.png"), ("caf\u00e9/a.png", "cafe\u0301/a.png"),
        ("images/a.png", "images/A.PNG"), ("images\\a.png", "images/a.png"), ("images/a.png ", "images/a.png"),
        ("images/a%20b.png", "images/a b.png"), ("C:\\data\\images\\a.png", "images/a.png"),
        ("/home/me/images/a.png", "images/a.png"),
    ],
)  # fmt: skip
def test_a_file_that_is_likely_meant_is_named(named, there, tmp_path):
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).write_bytes(b"")
    media = Media("image", tmp_path / named.lstrip("/"), tmp_path)
    with pytest.raises(UserError) as caught:
        read_image(media)
    assert f"; there is {there!r}" in str(caught.value)
    assert ("normal form" in str(caught.value)) == ("\u00e9" in named)


def test_nothing_is_named_where_nothing_is_near(tmp_path):
    (tmp_path / "b.png").write_bytes(b"")
    [fault] = Looks().faults(
        [replace(train_record(talk("<image>?", image="x")), media=(Media("image", tmp_path / "a.png", tmp_path),))]
    )
    assert "there is" not in fault
