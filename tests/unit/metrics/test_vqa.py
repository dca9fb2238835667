"""VQA accuracy; the vectors were graded by the official evaluator."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.metrics import score
from mllm_keeplora.metrics.vqa import CONTRACTIONS, normalise

NAMES = ["vqa_soft", "coin_textvqa"]
NORMALISED = [
    ("The Cat", "cat"),
    ("a", ""),
    ("two dogs", "2 dogs"),
    ("none", "0"),
    ("eleven", "eleven"),
    ("dont", "don't"),
    ("couldnt've", "couldn't've"),
    ("couldntve", "couldntve"),
    ("im", "im"),
    ("somebody'd", "somebodyd"),
    ("the dog's bone", "dog 's bone"),
    ("lets go", "lets go"),
    ("yes, it is", "yes it is"),
    ("10,000", "10000"),
    ("what?", "what"),
    ("3.5.", "3.5"),
    ("u.s.a.", "usa"),
    ("a.5", "a.5"),
    ("t-shirt", "t shirt"),
    ("t-shirt - red", "tshirt red"),  # a dash beside a space, so every dash goes without one
    ("(red)", "red"),
    ("and/or", "and or"),
    ("coca\ncola\tzero", "coca cola 0"),
    ("  spaces   within  ", "spaces within"),
    ("it’s", "it’s"),
    ("日本 é", "日本 é"),
    ("." * 40 + "x", "." * 8 + "x"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_an_answer_is_normalised_as_officially(text, expected):
    assert normalise(text) == expected


def test_the_contractions_are_those_of_the_official_table():
    assert len(CONTRACTIONS) == 114
    known = {"aint": "ain't", "'ow'sat": "'ow's'at", "yall'd've": "y'all'd've", "shed've": "she'd've", "twas": "'twas"}
    assert known.items() <= CONTRACTIONS.items()
    assert not {"shes", "id've", "im", "ive", "lets", "well", "hell"} & CONTRACTIONS.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_score_rises_with_the_number_of_people_who_agree(name, agreeing, expected):
    answers = ["red"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert score(name, "Red.", answers) == pytest.approx(expected, abs=1e-12)
    assert score(name, "blue", answers) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["red", ["red"] * 9, ["red"] * 11, []])
def test_anything_but_ten_answers_is_refused(name, answer):
    with pytest.raises(ValueError, match="needs the 10 human answers"):
        score(name, "red", answer)


TEXTS = st.text("abcAB 12.,'?!-/()\n\té", max_size=6)


@given(TEXTS, st.lists(TEXTS, min_size=10, max_size=10), st.randoms())
def test_the_order_of_the_answers_does_not_matter(prediction, answers, random):
    shuffled = random.sample(answers, 10)
    assert score("vqa_soft", prediction, answers) == pytest.approx(score("vqa_soft", prediction, shuffled), abs=1e-12)


@given(TEXTS, st.lists(TEXTS, min_size=10, max_size=10))
def test_the_score_depends_on_the_number_of_equal_answers_only(prediction, answers):
    equal = sum(normalise(answer) == normalise(prediction) for answer in answers)
    assert score("vqa_soft", prediction, answers) == pytest.approx(min(1.0, 0.3 * equal), abs=1e-12)


@given(st.text())
def test_any_text_can_be_normalised_and_keeps_single_spaces(text):
    assert "  " not in normalise(text)
    assert normalise(text) == normalise(text).strip()
