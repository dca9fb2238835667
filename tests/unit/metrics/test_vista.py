"""Counts are graded by their first number; the judge's rule is refused offline."""

import pytest

from mllm_keeplora.metrics import score


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("There are 3 cups.", "3", 1),
        ("Three cups", "3", 1),
        ("three", "3.0", 1),
        ("4 of 3", "3", 0),
        ("13", "3", 0),
        ("a3", "3", 0),
        ("-3", "3", 0),
        ("2.5 metres", "2.5", 1),
        ("twenty", "Twenty people", 1),
        ("someone", "1", 0),
        ("none", "0", 0),
        ("", "3", 0),
        ("many", "many", 0),
    ],
)
def test_counts_are_compared_by_their_first_number(prediction, answer, right):
    assert score("vista_number", prediction, answer) == right


def test_what_a_judge_grades_is_not_graded_here():
    with pytest.raises(ValueError, match=r"vista_judge cannot be graded offline: .*rows of the predictions file"):
        score("vista_judge", "a", "a")
