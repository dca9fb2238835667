"""Records from LLaVA JSON and from test files: what is read, and every way to be wrong."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from mllm_keeplora.data import Media
from mllm_keeplora.data.collate import batches, evenly_spaced, spaced_between_ends
from mllm_keeplora.data.media.images import Looks, images_of, read_image
from mllm_keeplora.data.readers import digest, read_test, read_train
from mllm_keeplora.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("L", (4, 6), 9).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def conversation(*texts: str, image: object = "images/a.png", **keys) -> dict:
    roles = ["human", "gpt"] * len(texts)
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"id": "1", "image": image, "conversations": turns, **keys}


def trained(folder: Path, *rows: object) -> list:
    path = folder / "train.json"
    path.write_text(json.dumps(rows))
    return read_train(path, folder)


def asked(folder: Path, *rows: object) -> list:
    path = folder / "test.json"
    path.write_text(json.dumps(rows))
    return read_test(path, folder)


def test_a_training_record_is_read_without_its_mark(folder):
    [record] = trained(folder, conversation("<image>\nWhat ?", "A cat", "Where ?", "Left"))
    assert [(turn.role, turn.text) for turn in record.turns] == [
        ("user", "What ?"),
        ("assistant", "A cat"),
        ("user", "Where ?"),
        ("assistant", "Left"),
    ]
    assert record.media[0].path == folder / "images" / "a.png"
    assert record.question_answers() == [("What ?", "A cat"), ("Where ?", "Left")]
    assert record.question == "What ?"
    assert record.origin == f"{folder / 'train.json'} record 0"


@pytest.mark.parametrize("text", ["<image>\nWhat ?", "What ?\n<image>", "<image> What ?"])
def test_the_mark_may_stand_before_or_after_the_question(text, folder):
    assert trained(folder, conversation(text, "A"))[0].turns[0].text == "What ?"


def test_a_record_may_have_no_image_or_several(folder):
    plain, both = trained(
        folder,
        conversation("What ?", "A", image=None),
        conversation("<image><image> Same ?", "yes", image=["images/a.png", "images/b.png"]),
    )
    assert plain.media == ()
    assert [media.path.name for media in both.media] == ["a.png", "b.png"]


def test_a_test_record_is_one_question_and_keeps_its_answer_apart(folder):
    [record] = asked(folder, {"question_id": 7, "image": "images/b.png", "text": "How many ?", "answer": "2"})
    assert (record.id, record.question, record.answer) == ("7", "How many ?", "2")
    assert [turn.role for turn in record.turns] == ["user"]


WRONG = {
    "unknown shape": ({"id": "1"}, "unknown shape: keys are ['id']"),
    "conversations that are no list": ({"conversations": 3}, "conversations must be a list, got 3"),
    "not an object": (["a"], "must be a JSON object, got list"),
    "mark missing": (conversation("What ?", "A"), "0 <image> marks for 1 images"),
    "mark without image": (conversation("<image> What ?", "A", image=None), "1 <image> marks for 0 images"),
    "ends with a question": (conversation("<image> What ?", "A", "And ?"), "end with gpt"),
    "no turn": (conversation(image=None), "must alternate"),
    "empty answer": (conversation("<image> What ?", " "), "a gpt turn is empty"),
    "turn that is no object": ({"conversations": ["a"]}, "turn 0 must be"),
    "text that is no text": ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 must be"),
    "number for an image": (conversation("<image> ?", "A", image=4), "path or a list of paths, got 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_training_record_is_refused_with_its_index(name, folder):
    row, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        trained(folder, conversation("<image> What ?", "A"), row)
    assert message in str(caught.value)
    assert "train.json record 1" in str(caught.value)


UNREADABLE = {
    "missing": ("images/c.png", "'images/c.png' does not exist"),
    "above the folder": ("../a.png", "leaves the data folder"),
    "absolute": ("/etc/passwd", "leaves the data folder"),
    "a folder": ("images", "is no file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_cannot_be_used_is_named_with_its_record(name, folder):
    image, message = UNREADABLE[name]
    records = trained(folder, conversation("<image> ?", "A"), conversation("<image> ?", "A", image=image))
    [fault] = Looks().faults(records)
    assert message in fault and "train.json record 1" in fault
    with pytest.raises(UserError, match=r"train\.json record 1"):
        images_of(records[1])


def test_pictures_may_be_links_into_a_store(folder, tmp_path_factory):
    """As in a hub's snapshot, or a cluster's shared storage."""
    store = tmp_path_factory.mktemp("store")
    (store / "x.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(store / "x.png")
    (folder / "linked").symlink_to(store)
    records = trained(
        folder, *(conversation("<image> ?", "A", image=f"{name}.png") for name in ("images/link", "linked/x"))
    )
    assert not list(Looks().faults(records))


def test_all_faults_of_a_file_are_told_together(folder):
    with pytest.raises(UserError) as caught:
        trained(folder, conversation("What ?", "A"), conversation("<image> ?", "A"), {"id": 1})
    message = str(caught.value)
    assert message.startswith("2 faults:")
    assert "record 0" in message and "record 2" in message and "record 1" not in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "text": "<image> ?", "answer": "A"}, "carries no <image> mark"),
        ({"question_id": 1, "text": "?"}, "answer must be a str or a list of them, got None"),
        ({"question_id": 1, "text": "?", "answer": 3}, "answer must be a str or a list of them, got 3"),
        ({"text": "?", "answer": "A"}, "question_id is missing"),
    ],
)
def test_a_wrong_test_record_is_refused(row, message, folder):
    with pytest.raises(UserError, match=message):
        asked(folder, row)


def test_a_question_id_occurs_once(folder):
    row = {"question_id": "q", "text": "?", "answer": "A"}
    with pytest.raises(UserError, match="record 1: question_id 'q' occurs twice"):
        asked(folder, row, row)


@pytest.mark.parametrize("text", ["[]", "{}", "[", "\xff"])
def test_a_file_without_records_is_refused_by_its_name(text, folder):
    (folder / "train.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"train\.json"):
        read_train(folder / "train.json", folder)


def test_a_missing_file_is_refused(folder):
    with pytest.raises(UserError, match="does not exist"):
        read_test(folder / "none.json", folder)


def test_the_digest_changes_with_the_content(folder):
    path = folder / "a.txt"
    path.write_text("one")
    first = digest(path)
    path.write_text("two")
    assert digest(path) != first


def test_images_are_read_as_rgb_and_broken_ones_are_named_with_their_record(folder):
    assert read_image(Media("image", folder / "images" / "a.png")).mode == "RGB"
    broken = folder / "images" / "b.png"
    broken.write_bytes(broken.read_bytes()[:40])
    records = trained(folder, conversation("<image> ?", "A"), conversation("<image> ?", "A", image="images/b.png"))
    advanced = []
    [fault] = Looks().faults(records, advanced.append)
    assert "record 1" in fault and "b.png cannot be read" in fault
    assert advanced == [1, 1]


def test_batches_cover_all_in_order():
    assert [list(batch) for batch in batches(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (5, [0, 2, 4, 6, 9]), (10, list(range(10)))]
)
def test_records_spaced_between_ends_have_the_first_and_the_last(count, chosen):
    assert list(spaced_between_ends(range(10), count)) == chosen


def test_evenly_spaced_thins_over_the_whole_list():
    assert list(evenly_spaced(range(10), 5)) == [0, 2, 4, 6, 8]
    assert list(evenly_spaced(range(3), 5)) == [0, 1, 2]
    for count in range(1, 24):
        chosen = list(evenly_spaced(range(24), count))
        gaps = {b - a for a, b in pairwise(chosen)}
        assert len(chosen) == count and chosen == sorted(set(chosen))
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
