"""Golden vectors: every (rule, answer, prediction) below was graded by the official scripts."""

import pytest

from mllm_keeplora.metrics import score

RS_AD = [
    ("Yes", "Yes.", 1),
    ("1", "10", 1),
    ("1", "There are 10 cars", 1),
    ("1", "There are 21 cars", 1),
    ("no", "I do not know", 1),
    ("0.5", "0.5", 0),
    ("Rural.", "rural", 1),
    ("between 0 and 10", "It is between 0 and 10 m2", 1),
    ("Yes", "Unanswerable", 0),
    ("Yes", "unanswerable, yes", 1),
]
MED = [("no", "Not seen, unknown", 1), ("No", "yes", 0), ("Heart", "the heart.", 1), ("a", "Unanswerable", 0)]
FIN = [("Yes", "Yes.", 1), ("A", "a .", 1), ("A", "A. up", 0), ("A.", "A.", 0), ("unanswerable", "Unanswerable", 0)]
SCI = [
    ("A", "A", "", "AI2D_1.png", 1),
    ("A", "A.", "", "AI2D_1.png", 0),
    ("A", "a", "", "TQA_1.png", 1),
    ("A", "A because", "", "AI2D-1.png", 1),
    ("A", "A because", "", "images/SciVerse_1.png", 0),
    ("A", "A because", "", "VQA_1.png", 0),
    ("A", "A because", "", "vqa_1.png", 1),
    ("Yes", "Yes, it is", "", "MapQA_1.png", 1),
    ("Ohio,Texas,Iowa", "Texas,Ohio,Utah", "Which states are red?", "MapQA_1.png", 2 / 3),
    ("Ohio, Texas", "Texas, Ohio", "Which states are red?", "MapQA_1.png", 0),
    ("Ohio, Texas", "Texas, Ohio", "which states are red?", "MapQA_1.png", 0),
    ("Ohio,Texas", "Texas,Ohio", "which states are red?", "MapQA_1.png", 0),
    ("Unanswerable", "Unanswerable", "", "AI2D_1.png", 0),
]


@pytest.mark.parametrize("name", ["dcl_rs", "dcl_ad"])
@pytest.mark.parametrize(("answer", "prediction", "expected"), RS_AD)
def test_rs_and_ad_follow_the_official_rule(name, answer, prediction, expected):
    assert score(name, prediction, answer) == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("stop", "stops", 1),
        ("stop", "please unstop, now", 1),
        ("stop", "it stopped now", 1),
        ("top", "i stopped", 0),
    ],
)
def test_an_answer_inside_a_sentence_must_touch_a_space_dot_or_comma(answer, prediction, expected):
    assert score("dcl_ad", prediction, answer) == expected


@pytest.mark.parametrize("name", ["dcl_rs", "dcl_ad"])
def test_an_answer_of_several_words_keeps_its_dots_and_may_sit_inside_words(name):
    assert score(name, "return lefts", "turn left") == 1
    assert score(name, "turn left", "turn left.") == 0


@pytest.mark.parametrize(("answer", "prediction", "expected"), MED)
def test_med_follows_the_official_rule(answer, prediction, expected):
    assert score("dcl_med", prediction, answer) == expected


@pytest.mark.parametrize(("answer", "prediction", "expected"), FIN)
def test_fin_follows_the_official_rule(answer, prediction, expected):
    assert score("dcl_fin", prediction, answer) == expected


@pytest.mark.parametrize(("answer", "prediction", "question", "image", "expected"), SCI)
def test_sci_follows_the_official_rule(answer, prediction, question, image, expected):
    assert score("dcl_sci", prediction, answer, question, image) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"), [("cat", "CAT", 1), ("cat", "cat.", 0), ("Unanswerable", "unanswerable", 1)]
)
def test_ucit_is_equality_of_upper_case(answer, prediction, expected):
    assert score("ucit_exact", prediction, answer) == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"), [("Yes", " yes\n", 1), ("Yes", "yes.", 0), ("Straße", "STRASSE", 1)]
)
def test_exact_ignores_case_and_outer_whitespace_only(answer, prediction, expected):
    assert score("exact", prediction, answer) == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("Heart", "The heart.", 1),
        ("heart", "hearts", 0),
        ("no", "I do not know", 0),
        ("1", "10", 0),
        ("0.5", "0.5.", 1),
        ("1.5", "15", 0),
        ("5", "-5", 0),
        ("1000", "1,000", 1),
        ("turn  left", "Turn left!", 1),
        ("A", "a.", 1),
        ("A", "The", 0),
        ("A", "", 0),
    ],
)
def test_strict_compares_whole_words(answer, prediction, expected):
    assert score("strict", prediction, answer) == expected
