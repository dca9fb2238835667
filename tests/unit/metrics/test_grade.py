"""One rule over a set, and what every registered rule has in common."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.metrics import SCORERS, Grades, grade, score
from mllm_keeplora.metrics.scorers import SET_SCORERS, SEVERAL_ANSWERS

PER_ANSWER = sorted(SCORERS.keys() - SET_SCORERS.keys())
RIGHT = {
    "coin_scienceqa": "A",
    "coin_grounding": "(0, 0, 1, 1)",
    "coin_textvqa": ["yes"] * 10,
    "vqa_soft": ["yes"] * 10,
    "vista_number": "3",
}
PREDICTIONS = {"coin_scienceqa": "A", "coin_grounding": "(0, 0, 1, 1)", "vista_number": "three"}


def right(name):
    """A prediction and the answer to it that a rule finds right."""
    answer = RIGHT.get(name, "yes")
    return PREDICTIONS.get(name, "yes"), answer[1:-1] if name == "coin_grounding" else answer


def test_the_table_holds_every_rule():
    assert len(SCORERS) == 21
    assert set(SET_SCORERS) == {"caption_mean"}
    assert SEVERAL_ANSWERS.issubset(SCORERS)


@pytest.mark.parametrize("name", PER_ANSWER)
def test_every_rule_gives_one_for_what_is_right_and_zero_for_what_is_not(name):
    prediction, answer = right(name)
    assert score(name, prediction, answer) == 1.0
    assert score(name, "no", answer, "Which states?", "AI2D_1.png") == 0.0
    assert type(score(name, "no", answer)) is float


@pytest.mark.parametrize("name", PER_ANSWER)
def test_every_rule_survives_any_prediction(name):
    _, answer = right(name)
    for text in ("", " ", "\n", "日本 é 🐶", "[" * 50, "Unanswerable", "\x00", "a" * 10_000, "١٢", "ﬃ"):
        assert 0.0 <= score(name, text, answer) <= 1.0


@pytest.mark.parametrize("name", PER_ANSWER)
def test_the_grade_of_a_set_is_the_mean_of_its_scores(name):
    prediction, answer = right(name)
    grades = grade(name, [prediction, "no", "no"], [answer] * 3, ["", "", ""], ("", "", ""))
    assert grades == Grades((1.0, 0.0, 0.0), pytest.approx(100 / 3), {})


def test_question_and_image_reach_the_rule_they_belong_to():
    answers, predictions = ["Ohio,Texas,Iowa", "A", "A"], ["Texas,Ohio,Utah", "A because", "A because"]
    questions, images = ["Which states are red?", "", ""], ["MapQA_1.png", "AI2D_1.png", "AI2D-1.png"]
    assert grade("dcl_sci", predictions, answers, questions, images).scores == (pytest.approx(2 / 3), 0.0, 1.0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1, max_size=20))
def test_percent_counts_the_right_ones(pairs):
    predictions, answers = zip(*pairs, strict=True)
    grades = grade("exact", predictions, answers, [""] * len(pairs), [""] * len(pairs))
    assert grades.percent == 100.0 * sum(p == a for p, a in pairs) / len(pairs)


@pytest.mark.parametrize("name", sorted(SCORERS.keys() - SEVERAL_ANSWERS))
def test_a_rule_for_one_answer_refuses_several(name):
    with pytest.raises(ValueError, match=rf"{name!r} compares with one answer, got 2: .*caption_mean, coin_textvqa"):
        score(name, "a", ["a", "b"])
    with pytest.raises(ValueError, match="compares with one answer, got 1"):
        grade(name, ["a"], [("a",)], [""], [""])


@pytest.mark.parametrize("call", [lambda: score("dcl_xx", "", ""), lambda: grade("dcl_xx", [""], [""], [""], [""])])
def test_an_unknown_rule_is_refused_and_the_known_ones_are_listed(call):
    with pytest.raises(ValueError, match=rf"'dcl_xx'; known scorers: {', '.join(sorted(SCORERS))}$"):
        call()


@pytest.mark.parametrize("columns", [([], [], [], []), (["a"], ["a"], [""], []), (["a"], ["a", "b"], [""], [""])])
@pytest.mark.parametrize("name", ["exact", "caption_mean"])
def test_columns_of_unequal_length_and_empty_ones_are_refused(name, columns):
    counted = [len(column) for column in columns]
    with pytest.raises(ValueError, match="got {}, {}, {} and {}$".format(*counted)):
        grade(name, *columns)


def test_the_caption_libraries_are_not_imported_before_captions_are_graded():
    code = "import sys, mllm_keeplora.metrics; print({'nltk', 'pycocoevalcap'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
