"""METEOR; the scores of PAIRS are those of the Java program."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pycocoevalcap", reason="without the extra `captions` METEOR is left unchecked")
pytest.importorskip("nltk", reason="without the extra `captions` METEOR is left unchecked")

from mllm_keeplora.metrics.captions import meteor_lists
from mllm_keeplora.metrics.captions.meteor import EXACT, PARAPHRASE, Match, _candidates, align, meteor

PAIRS = [
    ("the cat sat on the mat", ["on the mat sat the cat"], 0.4776696620223255),
    ("two dogs are running", ["a dog runs", "dogs run"], 0.38955352908366575),
    ("a kid rides a bike", ["a child is riding a bicycle"], 0.3632088987178343),
    ("the car is next to the house", ["the automobile stands beside the house"], 0.3255652321118374),
    ("a boy is climbing", ["the boy climbs up"], 0.15000000000000002),
    ("a boy eating", ["a boy eats"], 0.8285714285714284),
    ("a t-shirt", ["a t shirt"], 1.0),
    ("men", ["man"], 0.0),
    ("the boy 's hat", ["the boys hat"], 0.3549403380881626),
    ("a red car", ["a red car"], 1.0),
    ("a a a a", ["a"], 0.27586206896551724),
    ("the u.s. flag", ["the us flag"], 1.0),
    ("dr. who", ["dr who"], 0.1),
    ("on elm st.", ["on elm st"], 0.5074804812037806),
    ("a dog", ["a cat", "no animal here"], 0.1),
    ("zebra", ["giraffe"], 0.0),
    ("a man in front of a large number of people", ["a man before many people"], 0.380799442196608),
    ("it is n't 3:30 p.m. yet", ["it is not 3:30 pm yet"], 0.485997880002399),
    ("café naïve", ["café"], 0.3478260869565218),
]
SET = 0.38388474864430056


def test_every_score_is_that_of_the_java_program():
    whole, items = meteor([prediction for prediction, _, _ in PAIRS], [references for _, references, _ in PAIRS])
    assert items == pytest.approx([expected for _, _, expected in PAIRS], abs=1e-12)
    assert whole == pytest.approx(SET, abs=1e-12)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Leave the paraphrases out, which take seconds to read."""
    if "java" not in request.node.name:
        monkeypatch.setattr(meteor_lists, "paraphrases", lambda phrases: {})


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("dog cat", "cat dog", 0.4),  # all words match, in as many chunks: 1 - 0.6
        ("a dog", "a cow", 0.25 * 0.4),  # the article counts a quarter of the weight
        ("dog cat", "dog", 0.4 / (0.15 / 0.5 + 0.85)),  # precision 1/2, recall 1; one match in one chunk
        ("", "a dog", 0.0),
        ("a dog", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_small_cases_can_be_computed_by_hand(prediction, reference, expected):
    assert meteor([prediction], [[reference]])[1] == [pytest.approx(expected, abs=1e-12)]


WORDS = st.lists(st.sampled_from(["a", "the", "dog", "dogs", "runs", "running", "cat"]), max_size=6).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_the_best_reference_counts_and_equal_texts_score_one(prediction, references):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor_lists, "paraphrases", lambda phrases: {})
        _, (item,) = meteor([prediction], [references])
        singles = [meteor([prediction], [[reference]])[0] for reference in references]
    assert item == max(singles)
    assert 0.0 <= item <= 1.0
    if prediction and prediction in references:
        assert item == pytest.approx(1.0, abs=1e-12)


def test_the_score_of_a_set_weighs_long_texts_more_than_short_ones():
    whole, items = meteor(["dog", "one two three four"], [["dog"], ["five six seven eight"]])
    assert items == [1.0, 0.0]
    assert whole < sum(items) / 2


def test_an_alignment_prefers_few_chunks_and_uses_no_word_twice():
    candidates = [[Match(0, 1, 0, 1, 0), Match(0, 1, 2, 1, 0)], [Match(1, 1, 3, 1, 0)], []]
    found = align(["the", "dog", "barks"], candidates)
    assert [match.at for match in found.matches] == [2, 3]
    assert found.chunks == 1
    assert align([], []).matches == ()


def test_equal_texts_are_compared_word_by_word_only():
    table = {"a dog": ["dog"], "dog": ["a dog"]}
    kinds = [
        [match.kind for matches in _candidates(["a", "dog"], other, table) for match in matches]
        for other in (["a", "dog"], ["dog"])
    ]
    assert kinds == [[EXACT, EXACT], [EXACT, PARAPHRASE, PARAPHRASE]]


def test_a_paraphrase_may_span_several_words(monkeypatch):
    monkeypatch.setattr(meteor_lists, "paraphrases", lambda phrases: {"in front of": ["before"]})
    _, (item,) = meteor(["in front of zebras"], [["before zebras"]])
    # A paraphrase is worth 0.6 of its words; "in" and "of" are function words and weigh 0.25, the others 0.75.
    precision = (0.6 * (0.25 + 0.75 + 0.25) + 0.75) / (0.25 + 0.75 + 0.25 + 0.75)
    recall = (0.6 * 0.75 + 0.75) / (0.75 + 0.75)
    mean = 1 / (0.15 / precision + 0.85 / recall)
    assert item == pytest.approx(mean, abs=1e-12)  # all words of both, in one chunk: no penalty
