"""CoIN's rules; the vectors were graded by the official scripts."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mllm_keeplora.metrics import score

SCIENCEQA = [
    ("A", "A", 1),
    ("B", "b", 1),
    ("A", "A.", 1),
    ("A", "A. The cat", 1),
    ("A", "The answer is A.", 1),
    ("A", "The answer is B.", 0),
    ("D", "(D)", 1),
    ("B", "I think B", 0),  # the first lone character is I
    ("A", "a cat", 1),
    ("A", "Answer: 1 A", 0),
    ("B", "AB", 0),
    ("A", "A.The cat", 1),
    ("E", "F", 0),
    ("A", "", 0),
    ("A", "Anna", 0),
    ("C", "é C", 0),
    ("C", "it's C", 0),  # s stands alone, too
]
IMAGENET = [("cat", "cat", 1), ("cat", "a cat.", 1), ("tabby cat", "cat", 1), ("cat", "", 1), ("cat", "Cat", 0)]
GQA = [
    ("yes", "Yes.", 1),
    ("yes", "yes...", 1),
    ("yes", "yes. ", 0),
    ("Yes", "Yes", 0),  # the answer is not lower-cased
    ("no", "no, it is", 0),
    ("", ".", 1),
    ("left", " left", 1),
    ("left", "  left", 0),
]
UPPER = [("yes", "YES", 1), ("yes", "yes.", 0), ("ß", "SS", 1), ("", "", 1), ("unanswerable", "Unanswerable", 1)]
OCRVQA = [
    ("Penguin Books", "penguin books", 1),
    ("yes", "yes.", 0),
    ("Unanswerable", "Unanswerable", 0),
    ("Unanswerable", "unanswerable", 1),
    ("", "", 1),
]
GOLD = "[0.10, 0.20, 0.50, 0.60]"
GROUNDING = [
    ("[0.10, 0.20, 0.50, 0.60]", 1),  # read as .10, 0.20, 0.50, 0.6
    ("[[0.10, 0.20, 0.50, 0.60]]", 1),
    ("[9.10, 0.20, 0.50, 0.60]", 1),  # the first digit is lost, too
    (" [9.10, 0.20, 0.50, 0.60]", 1),
    ("[0.10, 0.20, 0.50, 0.39]", 0),  # y2 is read as 0.3, one digit less
    ("(0.10, 0.20, 0.50, 0.39)", 0),
    ("(0.10, 0.20, 0.50, 0.41)", 1),
    ("[0.9, 0.9, 1.0, 1.0]", 0),
    ("[0.10, 0.20, 0.50]", 0),
    ("[0.10, 0.20, 0.50, 0.60, 0.70]", 0),
    ("box: [0.10, 0.20, 0.50, 0.60]", 0),
    ("[nan, nan, nan, nan]", 0),
    ("[0inf, inf, inf, inf]", 0),
    ("[0.1; 0.2; 0.5; 0.6]", 0),
    ("[]", 0),
    ("", 0),
    ("猫", 0),
]


@pytest.mark.parametrize(("answer", "prediction", "expected"), SCIENCEQA)
def test_scienceqa_reads_the_option_as_the_official_script_does(answer, prediction, expected):
    assert score("coin_scienceqa", prediction, answer) == expected


@pytest.mark.parametrize("answer", ["", "a", "F", "cat"])
def test_a_scienceqa_answer_that_is_no_option_is_refused(answer):
    with pytest.raises(ValueError, match=f"A, B, C, D, E, got {answer!r}"):
        score("coin_scienceqa", "A", answer)


@given(st.sampled_from("ABCDE"), st.sampled_from("ABCDE"), st.sampled_from(["{}", "{}.", "{}. x", "Is it {}?", "({})"]))
def test_an_option_in_a_usual_form_is_recognised(option, answer, form):
    assert score("coin_scienceqa", form.format(option), answer) == (option == answer)


@pytest.mark.parametrize(("answer", "prediction", "expected"), IMAGENET)
def test_imagenet_is_containment_of_either_side(answer, prediction, expected):
    assert score("coin_imagenet", prediction, answer) == expected


@pytest.mark.parametrize(("answer", "prediction", "expected"), GQA)
def test_gqa_normalises_the_prediction_only(answer, prediction, expected):
    assert score("coin_gqa", prediction, answer) == expected


@pytest.mark.parametrize("name", ["coin_vizwiz", "coin_vqav2"])
@pytest.mark.parametrize(("answer", "prediction", "expected"), UPPER)
def test_vizwiz_and_vqav2_are_equality_of_upper_case(name, answer, prediction, expected):
    assert score(name, prediction, answer) == expected


@pytest.mark.parametrize(("answer", "prediction", "expected"), OCRVQA)
def test_ocrvqa_is_equality_of_lower_case_unless_unanswerable(answer, prediction, expected):
    assert score("coin_ocrvqa", prediction, answer) == expected


@pytest.mark.parametrize(("prediction", "expected"), GROUNDING)
def test_grounding_reads_the_box_as_the_official_script_does(prediction, expected):
    assert score("coin_grounding", prediction, GOLD) == expected


def test_an_overlap_of_exactly_one_half_is_too_little():
    assert score("coin_grounding", "(0, 0, 1, 0.5)", "[0, 0, 1, 1]") == 0
    assert score("coin_grounding", "(0, 0, 1, 0.51)", "[0, 0, 1, 1]") == 1


@pytest.mark.parametrize("answer", ["", "left", "[0.1, 0.2, 0.3]", "[a, b, c, d]"])
def test_a_grounding_answer_that_is_no_box_is_refused(answer):
    with pytest.raises(ValueError, match="must be a box like"):
        score("coin_grounding", GOLD, answer)


@st.composite
def boxes(draw):
    """Corners in hundredths."""
    x1, y1 = draw(st.integers(0, 14)), draw(st.integers(0, 14))
    return x1, y1, draw(st.integers(x1 + 1, 16)), draw(st.integers(y1 + 1, 16))


def cells(box):
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@given(boxes(), boxes())
@example((0, 0, 2, 1), (0, 0, 2, 2))
def test_the_overlap_is_the_share_of_common_cells(box, gold):
    share = Fraction(len(cells(box) & cells(gold)), len(cells(box) | cells(gold)))
    texts = [", ".join(str(number) for number in each) for each in (box, gold)]
    assert score("coin_grounding", f"({texts[0]})", f"[{texts[1]}]") == (share > Fraction(1, 2))
