import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.metrics import mistake

CASES = [
    ("yes", "yes", False, None),
    (" Yes\n", "yes", True, None),
    ("", "yes", False, "blank"),
    ("  \n", "yes", True, "blank"),
    ("it is a", "a car", True, "truncated"),
    ("it is a red car and", "red car", True, "truncated"),
    ("yes.", "yes", False, "format"),
    ("The Heart", "heart", False, "format"),
    ("it is a red car", "red car", False, "format"),
    ("red car", "the red car", False, "format"),
    ("a car, red", "red car", False, "wrong"),
    ("infrared cars", "red car", False, "wrong"),
    ("I do not know", "no", False, "wrong"),
    ("The answer is A.", "A", False, "format"),
    ("A) cat", "A", False, "format"),
    ("a cat", "A", False, "wrong"),
    ("The answer is B, a cat", "B", False, "format"),
    ("there are 4 cars", "4", False, "format"),
    ("there are 4.5 cars", "4", False, "wrong"),
    ("-4", "4", False, "wrong"),
    ("5", "4", False, "off_by_one"),
    ("3.", "4", False, "off_by_one"),
    ("five", "4", False, "off_by_one"),
    ("1,001", "1000", False, "off_by_one"),
    ("-1", "0", False, "off_by_one"),
    ("6", "4", False, "wrong"),
    ("5.0", "4", False, "wrong"),
    ("5 cars", "4", False, "wrong"),
    ("9" * 5000, "4", False, "wrong"),
    ("²", "1", False, "wrong"),
    ("cat", "", False, "wrong"),
    ("日本", "日本", False, None),
    ("cat", "dog", False, "wrong"),
]


@pytest.mark.parametrize(("prediction", "answer", "hit_token_limit", "expected"), CASES)
def test_the_first_test_that_holds_names_the_mistake(prediction, answer, hit_token_limit, expected):
    assert mistake(prediction, answer, hit_token_limit) == expected


def test_any_of_several_answers_will_do():
    assert mistake("blue", ["red", "Blue"], False) is None
    assert mistake("it is blue", ("red", "blue"), False) == "format"
    assert mistake("3", ["7", "2"], False) == "off_by_one"
    assert mistake("3", [], False) == "wrong"


def test_the_rule_that_scored_has_the_say_about_right():
    assert mistake("it is a red car", "red car", False, is_right=True) is None
    assert mistake("yes", "yes", False, is_right=False) == "format"
    assert mistake("", "", False, is_right=False) == "blank"


@given(st.text(max_size=12), st.text(max_size=6), st.booleans(), st.sampled_from([None, True, False]))
def test_every_prediction_gets_one_of_the_kinds(prediction, answer, hit_token_limit, is_right):
    kind = mistake(prediction, answer, hit_token_limit, is_right)
    assert kind in {None, "blank", "truncated", "format", "off_by_one", "wrong"}
    if is_right is not None:
        assert (kind is None) == is_right
    assert hit_token_limit or kind != "truncated"


@given(st.integers(-(10**17), 10**17), st.integers(-3, 3))
def test_whole_numbers_are_off_by_one_exactly_when_they_differ_by_one(number, difference):
    kind = mistake(str(number + difference), str(number), False)
    assert kind == (None if difference == 0 else "off_by_one" if abs(difference) == 1 else "wrong")
