import pytest

from mllm_keeplora.metrics import BlindAnswerer

PAIRS = [("Is it day?", "yes"), ("Is it day?", "no"), ("Is it day?", "no"), ("Which one?", "B"), ("Which one?", "A")]


def test_a_seen_question_gets_its_most_frequent_answer():
    assert BlindAnswerer(PAIRS).answer("Is it day?") == "no"


def test_equally_frequent_answers_are_settled_by_order():
    assert BlindAnswerer(PAIRS).answer("Which one?") == "A"
    assert BlindAnswerer(reversed(PAIRS)).answer("Which one?") == "A"


def test_an_unseen_question_gets_the_most_frequent_answer_overall():
    assert BlindAnswerer(PAIRS).answer("How many?") == "no"
    assert BlindAnswerer([("a", "x"), ("b", "y")]).answer("c") == "x"


def test_frequency_overall_is_summed_over_questions():
    pairs = [("q1", "a"), ("q1", "a"), ("q2", "b"), ("q3", "b"), ("q4", "b")]
    assert BlindAnswerer(pairs).answer("unseen") == "b"


def test_an_answerer_without_pairs_is_refused():
    with pytest.raises(ValueError, match="got none"):
        BlindAnswerer([])
