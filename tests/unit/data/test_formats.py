"""Every shape that records come in, told by its keys, and what each says."""

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from mllm_keeplora.data.formats import Fault, Layout, test_record, train_record
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.schema import Media, Turn

QUESTION, ANSWER = Turn("user", "What is shown?"), Turn("assistant", "A bridge.")
LLAVA = {
    "id": "a1",
    "image": "img/1.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A bridge."}],
}
MARKED = [{"role": "user", "content": "<image>What is shown?"}, {"role": "assistant", "content": "A bridge."}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A bridge."}]},
]
IMAGE = (Media("image", Path("img/1.jpg")),)
SHAPES = {
    "llava": LLAVA,
    "llava with a list": {**LLAVA, "image": ["img/1.jpg"]},
    "sharegpt": {"conversations": LLAVA["conversations"], "images": ["img/1.jpg"]},
    "ms-swift": {"messages": MARKED, "images": ["img/1.jpg"]},
    "ms-swift pair": {"query": "<image>What is shown?", "response": "A bridge.", "images": ["img/1.jpg"]},
    "ms-swift's sharegpt": {
        "conversation": [{"human": "<image>What is shown?", "assistant": "A bridge."}],
        "images": ["img/1.jpg"],
    },
    "alpaca": {"instruction": "<image>What is shown?", "input": "", "output": "A bridge.", "images": ["img/1.jpg"]},
    "hugging face": {"messages": PARTS, "images": ["img/1.jpg"]},
    "hugging face, one image": {"messages": PARTS, "image": "img/1.jpg"},
    "hugging face, path": {"messages": PARTS, "images": [{"bytes": None, "path": "img/1.jpg"}]},
    "prompt and completion": {"prompt": PARTS[:1], "completion": PARTS[1:], "images": ["img/1.jpg"]},
    "image in its part": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "img/1.jpg"}, PARTS[0]["content"][1]]},
            PARTS[1],
        ]
    },
    "image address in its part": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "file://img/1.jpg"}},
                    PARTS[0]["content"][1],
                ],
            },
            PARTS[1],
        ]
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_says_the_same(name):
    record = train_record(SHAPES[name])
    assert record.turns == (QUESTION, ANSWER)
    assert record.media == IMAGE


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_of_one_question_can_be_graded(name):
    record = test_record({"id": "q1", **SHAPES[name]})
    assert (record.turns, record.answer, record.media) == ((QUESTION,), "A bridge.", IMAGE)


SHOWN = [{"role": "user", "content": "<video>What is shown?"}, {"role": "assistant", "content": "A bridge."}]
CLIP = (Media("video", Path("a/1.mp4")),)
CLIP_SHAPES = {
    "llava": {
        "video": "a/1.mp4",
        "conversations": [{"from": "human", "value": "<video>\nWhat is shown?"}, LLAVA["conversations"][1]],
    },
    "llava with a list": {
        "video": ["a/1.mp4"],
        "conversations": [{"from": "human", "value": "What is shown?\n<video>"}, LLAVA["conversations"][1]],
    },
    "llava with the mark of an image": {**{key: LLAVA[key] for key in ("id", "conversations")}, "video": "a/1.mp4"},
    "llama-factory": {
        "conversations": [{"from": "human", "value": "<video>What is shown?"}, LLAVA["conversations"][1]],
        "videos": ["a/1.mp4"],
    },
    "ms-swift": {"messages": SHOWN, "videos": ["a/1.mp4"]},
    "ms-swift pair": {"query": "<video>What is shown?", "response": "A bridge.", "videos": ["a/1.mp4"]},
    "hugging face": {
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is shown?"}]},
            SHOWN[1],
        ],
        "videos": ["a/1.mp4"],
    },
    "hugging face, in its part": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "video", "video": "a/1.mp4"}, {"type": "text", "text": "What is shown?"}],
            },
            SHOWN[1],
        ]
    },
    "hugging face, path": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "video", "path": "file://a/1.mp4"}, {"type": "text", "text": "What is shown?"}],
            },
            SHOWN[1],
        ]
    },
}


@pytest.mark.parametrize("name", CLIP_SHAPES)
def test_every_shape_shows_a_clip_alike(name):
    record = train_record(CLIP_SHAPES[name])
    assert (record.turns, record.media) == ((QUESTION, ANSWER), CLIP)
    asked = test_record({"id": "q1", **CLIP_SHAPES[name]})
    assert (asked.turns, asked.answer, asked.media) == ((QUESTION,), "A bridge.", CLIP)


def test_a_test_record_names_a_clip():
    record = test_record({"question_id": 1, "text": "What is shown?", "answer": "A bridge.", "video": "a/1.mp4"})
    assert record.media == CLIP and record.turns == (QUESTION,)


def test_seconds_of_a_clip_are_told_beside_it_or_in_its_part():
    part = Media("video", Path("a/1.mp4"), start=1.0, end=2.5)
    told = {"video_start": 1, "video_end": 2.5}
    assert train_record({"messages": SHOWN, "videos": ["a/1.mp4"], **told}).media == (part,)
    parts = [{"type": "video", "video": "a/1.mp4", **told}, {"type": "text", "text": "?"}]
    assert train_record({"messages": [{"role": "user", "content": parts}, SHOWN[1]]}).media == (part,)


def test_a_list_of_pictures_is_a_clip():
    files = (Path("a/1.png"), Path("a/2.png"))
    parts = [{"type": "video", "video": ["a/1.png", "a/2.png"]}, {"type": "text", "text": "?"}]
    assert train_record({"messages": [{"role": "user", "content": parts}, SHOWN[1]]}).media == (
        Media("video", files[0], files=files),
    )


def test_pictures_and_clips_follow_the_order_of_their_marks():
    row = {"messages": [{"role": "user", "content": "<video> and <image> and <video>?"}, SHOWN[1]]}
    record = train_record({**row, "images": ["1.png"], "videos": ["1.mp4", "2.mp4"]})
    assert [media.path.name for media in record.media] == ["1.mp4", "1.png", "2.mp4"]
    clips = [replace(each, video=VideoOptions(frames=2)) for each in record.media if each.type == "video"]
    shown = replace(record, media=(clips[0], record.media[1], clips[1])).as_pictures()
    assert [(media.path.name, media.frame) for media in shown.media] == [
        ("1.mp4", 0), ("1.mp4", 1), ("1.png", None), ("2.mp4", 0), ("2.mp4", 1),
    ]  # fmt: skip
    assert shown.turns[0].text == "<image><image> and <image> and <image><image>?"
    assert shown.as_pictures() is shown


def test_a_system_line_stands_first_and_history_before_the_question():
    row = {"instruction": "And now?", "output": "Left.", "history": [["Where?", "Right."]], "system": "Be brief."}
    assert [(turn.role, turn.text) for turn in train_record(row).turns] == [
        ("system", "Be brief."),
        ("user", "Where?"),
        ("assistant", "Right."),
        ("user", "And now?"),
        ("assistant", "Left."),
    ]
    spoken = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    turns = train_record({"messages": [*spoken, {"role": "assistant", "content": "Right."}]}).turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant"]


def test_an_alpaca_input_follows_the_instruction():
    assert train_record({"instruction": "Add.", "input": "1 and 2", "output": "3"}).turns[0].text == "Add.\n1 and 2"


@pytest.mark.parametrize("switch", [{"loss": False}, {"loss_scale": 0.0}])
def test_an_answer_may_have_its_loss_switched_off(switch):
    first = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "a", **switch}]
    last = [{"role": "user", "content": "B?"}, {"role": "assistant", "content": "b", "loss": True}]
    assert [turn.trained for turn in train_record({"messages": first + last}).turns[1::2]] == [False, True]
    with pytest.raises(Fault, match="no token is trained"):
        train_record({"messages": first})


def test_images_inside_a_record_keep_their_bytes():
    picture = b"\x89PNG..."
    inside = train_record({"messages": PARTS, "images": [{"bytes": picture, "path": "1.png"}]})
    assert inside.media == (Media("image", Path("1.png"), data=picture),)
    address = "data:image/png;base64," + base64.b64encode(picture).decode()
    [image] = train_record({"messages": MARKED, "images": [address]}).media
    assert image == Media("image", Path(), data=picture)


def test_images_follow_the_order_of_their_marks_wherever_they_are_named():
    parts = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image", "image": "second.png"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    record = train_record({"messages": turns, "images": ["first.png"]})
    assert [str(media.path) for media in record.media] == ["first.png", "second.png"] and record.turns[
        0
    ].text == "<image> and <image>"


@pytest.mark.parametrize(
    ("text", "images", "kept"),
    [
        ("<image><image> Same?", 2, "Same?"),
        ("<image>\n<image>\nSame?", 2, "Same?"),
        ("Is <image> left of <image>?", 2, "Is <image> left of <image>?"),
        ("<image> or <image>?", 2, "<image> or <image>?"),
        ("What is in <image>?", 1, "What is in <image>?"),
    ],
)
def test_marks_stay_where_images_do_not_all_come_first(text, images, kept):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    record = train_record({"messages": turns, "images": ["a.png"] * images})
    assert record.turns[0].text == kept and len(record.media) == images


def test_marks_stay_in_all_turns_where_a_later_one_shows_an_image():
    texts = ["<image> What?", "A cat.", "And <image>?", "A dog."]
    roles = ["user", "assistant"] * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert [turn.text for turn in train_record({"messages": turns, "images": ["a", "b"]}).turns] == texts


def test_columns_and_tags_of_a_dataset_info_are_followed():
    row = {
        "talk": [{"who": "asker", "says": "<image>What is shown?"}, {"who": "bot", "says": "A bridge."}],
        "pics": ["1"],
    }
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "asker", "assistant_tag": "bot"}
    record = train_record(row, Layout("sharegpt", {"messages": "talk", "images": "pics"}, tags))
    assert record.turns == (QUESTION, ANSWER) and record.media == (Media("image", Path("1")),)
    row = {"q": "<image>What is shown?", "a": "A bridge.", "pics": ["1"]}
    record = train_record(row, Layout("alpaca", {"prompt": "q", "response": "a", "images": "pics"}))
    assert record.turns == (QUESTION, ANSWER) and record.media == (Media("image", Path("1")),)


def test_several_gold_answers_are_kept():
    assert test_record({"question_id": 1, "text": "?", "answer": ["2", "two"]}).answer == ("2", "two")


WRONG = {
    "keys of no shape": ({"foo": 1, "bar": 2}, "unknown shape: keys are ['bar', 'foo']"),
    "a role that is not known": ({"messages": [{"role": "tool", "content": "x"}]}, "system|user|assistant"),
    "roles that do not alternate": ({"messages": [MARKED[1], MARKED[0]], "images": ["1"]}, "must alternate"),
    "a system line in between": (
        {"messages": [*MARKED, {"role": "system", "content": "x"}, *MARKED], "images": ["1", "1"]},
        "must alternate",
    ),
    "marks without images": ({"messages": MARKED}, "1 <image> marks for 0 images"),
    "images without marks": (
        {"messages": [QUESTION, ANSWER] and MARKED, "images": ["1", "2"]},
        "1 <image> marks for 2",
    ),
    "a part of another kind": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, MARKED[1]]},
        "neither text, image nor video",
    ),
    "a clip without a mark": (
        {"messages": MARKED, "images": ["1"], "videos": ["v.mp4"]},
        "0 <video> marks for 1 clips",
    ),
    "a mark without a clip": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, MARKED[1]]},
        "1 <video> marks for 0 clips",
    ),
    "a clip under another name": (
        {"messages": [{"role": "user", "content": "?"}, MARKED[1]], "film": "a.mp4"},
        "call it `video`",
    ),
    "a clip on the net": (
        {"messages": [{"role": "user", "content": "<video>?"}, MARKED[1]], "videos": ["https://x/1.mp4"]},
        "video 'https://x/1.mp4' is an address on the net",
    ),
    "a clip of no pictures": (
        {"messages": [{"role": "user", "content": "<video>?"}, MARKED[1]], "videos": [[]]},
        "must be a list of paths",
    ),
    "seconds that are none": (
        {"messages": [{"role": "user", "content": "<video>?"}, MARKED[1]], "videos": ["1.mp4"], "video_start": "0:01"},
        "video_start and video_end must be seconds, got '0:01' and None",
    ),
    "sounds": ({"messages": MARKED, "images": ["1"], "audio": ["a.wav"]}, "audio is not supported yet"),
    "an address on the net": ({"messages": MARKED, "images": ["https://x/1.png"]}, "address on the net"),
    "boxes of a grounding record": (
        {"messages": MARKED, "images": ["1"], "objects": {"bbox": [[1, 2, 3, 4]]}},
        "objects is",
    ),
    "a loss between 0 and 1": (
        {"messages": [MARKED[0], {**MARKED[1], "loss_scale": 0.3}], "images": ["1"]},
        "loss and loss_scale may be 0 or 1, got 0.3",
    ),
    "raw base64": ({"messages": MARKED, "images": ["iVBOR" * 2000]}, "image must be a path"),
    "a null in a path": ({"messages": MARKED, "images": ["a\0.png"]}, "image must be a path"),
    "bytes that are text": ({"messages": MARKED, "images": [{"bytes": "iVBOR"}]}, "must be bytes, got str"),
    "broken base64": ({"messages": MARKED, "images": ["data:image/png;base64,@@"]}, "not valid base64"),
    "exchange without an answer": ({"conversation": [{"human": "a"}]}, "must hold {human: text, assistant: text}"),
    "history that is no pairs": ({"instruction": "a", "output": "b", "history": ["x"]}, "pairs of question and answer"),
    "text that is no text": ({"instruction": 3, "output": "b"}, "instruction must be text, got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_understood_is_said(name):
    row, message = WRONG[name]
    with pytest.raises(Fault) as caught:
        train_record(row)
    assert message in str(caught.value)


def test_a_graded_record_asks_one_question():
    with pytest.raises(Fault, match="asks one question, this one asks 2"):
        test_record({"id": "1", "messages": [*MARKED, {"role": "user", "content": "And?"}, MARKED[1]], "images": ["1"]})


@pytest.mark.parametrize("key", ["type", "task"])
def test_a_question_says_what_kind_it_is(key):
    row = {"question_id": "1", "image": "a.png", "text": "How many?", "answer": "3", key: "Count"}
    assert test_record(row).kind == "Count"
