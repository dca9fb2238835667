"""MLLM-ACL's rules; the vectors were graded by the official scripts."""

import pytest

from mllm_keeplora.metrics import SCORERS, UNGRADED, grade, score

LATEX = "Please write out the expression of the formula in the image using LaTeX format."
OCRBENCH = [
    (["CENTRE", "center"], "The Center", "", 1),
    (["centre"], "THE CENTRE.", "", 1),
    ("centre", "centre", "", 1),
    (["new york"], "new\nyork", "", 0),  # the line break goes and leaves no space
    (["new\nyork"], "newyork", "", 1),
    (["new york"], "newyork", "", 0),
    (["a", "b"], "c", "", 0),
    (["日本"], "日本語", "", 1),
    ([], "x", "", 0),
    ([""], "", "", 1),
    (["x"], "", "", 0),
    ([r"\frac { A } { b }"], r"\frac{A}{b}", LATEX, 1),
    ([r"\frac { A } { b }"], "\\frac {A}\n{ b } ", LATEX, 1),
    ([r"\frac { A } { b }"], r"\frac{a}{b}", LATEX, 0),
    ([r"\frac { A } { b }"], r"\frac{A}{b}", "what is written in the image?", 0),
]
COUNT = [("3", "3", 1), ("3", "There are 3.", 1), ("1", "10", 1), ("Two", "tw o", 1), ("4.", "4", 1), ("4", "four", 0)]


@pytest.mark.parametrize(("answers", "prediction", "question", "expected"), OCRBENCH)
def test_ocrbench_is_containment_of_any_answer(answers, prediction, question, expected):
    assert score("ocrbench", prediction, answers, question) == expected


@pytest.mark.parametrize(("answer", "prediction", "expected"), COUNT)
def test_a_count_is_containment_without_spaces_and_dots(answer, prediction, expected):
    assert score("cvbench_count", prediction, answer) == expected


@pytest.mark.parametrize("name", ["mathvista", "gui"])
def test_what_cannot_be_graded_offline_says_why(name):
    assert set(UNGRADED) == {"mathvista", "gui", "vista_judge"}
    assert name not in SCORERS
    for call in (lambda: score(name, "x", "x"), lambda: grade(name, ["x"], ["x"], [""], [""])):
        with pytest.raises(ValueError, match=f"{name} cannot be graded offline: .*submit.jsonl"):
            call()
