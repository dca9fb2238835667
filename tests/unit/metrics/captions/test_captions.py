"""The caption mean; GOLDEN was graded by the COCO caption tools with Java."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pycocoevalcap", reason="without the extra `captions` the caption mean is left unchecked")
pytest.importorskip("nltk", reason="without the extra `captions` the caption mean is left unchecked")

from mllm_keeplora.metrics import grade, score
from mllm_keeplora.metrics.captions import captions, meteor_lists
from tests.unit.metrics.captions import caption_oracle as oracle

GOLDEN = [
    (
        "A man riding a wave on top of a surfboard.",
        ["A surfer rides a big wave.", "A man is surfing in the ocean.", "A person on a surfboard riding a wave."],
        0.5761226132235268,
    ),
    (
        "Two dogs. They're playing with a red frisbee in the park!",
        [
            "Two dogs play with a frisbee.",
            "A pair of dogs are chasing a red disc in a park.",
            "The dogs' frisbee isn't blue.",
        ],
        0.4443805046236512,
    ),
    (
        "quality issues are too severe to recognize visual content",
        ["Quality issues are too severe to recognize visual content.", "A can of soup (tomato) on a counter."],
        1.5714285712948084,
    ),
    ("", ["A blurry picture of a keyboard.", "Somebody's black keyboard; it is out of focus."], 0.0),
    (
        'A t-shirt that reads "Coca-Cola" for $5.00 at the U.S. store',
        ["A red Coca-Cola shirt hangs in a shop - the price tag says $5.00!", "T-shirts for sale, 50% off."],
        0.24818159884472588,
    ),
    (
        "The screen of a phone shows the time. " * 9 + "It is 3:30 p.m.",
        ["A cell phone's screen displays that it's 3:30 p.m.", "The display of a mobile phone shows the time of day."],
        0.11202769321155445,
    ),
]
PARTS = {
    "BLEU-1": 36.97478991565567,
    "BLEU-2": 26.098171412416864,
    "BLEU-3": 18.418936621727358,
    "BLEU-4": 14.32071132285756,
    "METEOR": 30.005302277135492,
    "ROUGE-L": 42.67738351504143,
    "CIDEr": 131.99601970531123,
}
PERCENT = 42.92733068144937


def grade_captions(predictions, answers):
    blank = [""] * len(predictions)
    return grade("caption_mean", predictions, answers, blank, blank)


@pytest.mark.slow  # METEOR's numbers alone are in test_meteor, the other parts' rules below
def test_a_set_gets_the_numbers_of_the_java_tools(capsys):
    predictions, answers, items = zip(*GOLDEN, strict=True)
    grades = grade_captions(predictions, answers)
    assert grades.parts == pytest.approx(PARTS, abs=1e-9)
    assert list(grades.parts) == list(PARTS)
    assert grades.percent == pytest.approx(PERCENT, abs=1e-9)
    assert grades.scores == pytest.approx(items, abs=1e-9)
    assert capsys.readouterr().out == ""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Leave METEOR's paraphrases out, which take seconds to read."""
    if "java" not in request.node.name:
        monkeypatch.setattr(meteor_lists, "paraphrases", lambda phrases: {})


def test_small_cases_can_be_computed_by_hand():
    parts = grade_captions(["the cat sat"], [["the cat sat down"]]).parts
    assert parts["BLEU-1"] == pytest.approx(71.6531, abs=1e-3)  # exp(1 - 4/3)
    assert parts["ROUGE-L"] == pytest.approx(100 * 2.44 * 0.75 / (0.75 + 1.44), abs=1e-9)
    assert parts["CIDEr"] == 0.0  # in a set of one no word is rare
    two = grade_captions(["a b c d", "x"], [["a b c d"], ["e f g h"]])
    assert two.parts["CIDEr"] == pytest.approx(500.0, abs=1e-9)  # 10 and 0
    assert two.parts["BLEU-4"] == pytest.approx(100 * (4 / 5) ** 0.25 * math.exp(1 - 8 / 5), abs=1e-6)


SENTENCES = st.lists(st.sampled_from(["one", "two", "tree", "dog"]), min_size=1, max_size=6)
ITEMS = st.lists(st.tuples(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3)), min_size=1, max_size=4)


@given(ITEMS)
@settings(deadline=None)
def test_every_part_equals_the_loops_of_the_oracle(items):
    predictions = [" ".join(prediction) for prediction, _ in items]
    answers = [tuple(" ".join(reference) for reference in references) for _, references in items]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor_lists, "paraphrases", lambda phrases: {})
        grades = grade_captions(predictions, answers)
    for n in range(1, 5):
        assert grades.parts[f"BLEU-{n}"] == pytest.approx(100 * oracle.bleu(items, n), abs=1e-6)
    assert grades.parts["ROUGE-L"] == pytest.approx(100 * oracle.rouge(items), abs=1e-9)
    assert grades.parts["CIDEr"] == pytest.approx(100 * oracle.cider(items), abs=1e-9)
    assert grades.percent == pytest.approx(sum(grades.parts.values()) / 7, abs=1e-9)
    assert len(grades.scores) == len(items)


def test_a_long_prediction_is_graded_whole():
    references = [["a dog runs on grass"]]
    long = "a dog runs on grass".ljust(300)
    assert grade_captions([long + " cat"], references) != grade_captions([long], references)


def test_one_answer_is_one_reference_and_one_caption_is_a_set_of_one():
    assert grade_captions(["a dog"], ["a dog"]) == grade_captions(["a dog"], [["a dog"]])
    assert score("caption_mean", "a dog runs on grass", "a dog runs on grass") == pytest.approx(6 / 7, abs=1e-9)
    assert score("caption_mean", "", ["a dog", "a cat"]) == 0.0


@pytest.mark.parametrize(
    ("answers", "message"),
    [([["a"], []], "got none for item 1"), ([["."], ["", "?"]], "references with words, got none")],
)
def test_missing_references_are_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        grade_captions(["a", "b"], answers)


@pytest.mark.parametrize("library", ["nltk", "pycocoevalcap"])
def test_without_its_libraries_the_extra_is_named(library, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"caption_mean needs {library}.*mllm-keeplora\[captions\]"):
        captions.grade_captions(["a"], ["a"])
