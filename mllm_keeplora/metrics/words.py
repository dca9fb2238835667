"""Scorers of our own, for a user's domains and as a second opinion next to an official rule, never instead of it."""

import re

ARTICLES = frozenset({"a", "an", "the"})
# A point between digits and a minus in front of a number stay: without them 1.5 would equal 15, and -5 would equal 5.
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.(?=\d))(?!(?<!\S)-(?=\d))[^\w\s]|_")


def score_exact(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade by equality, ignoring case and outer whitespace."""
    return float(prediction.strip().casefold() == answer.strip().casefold())


def score_strict(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade by equality of the words, after case, punctuation, articles and spacing are removed."""
    return float(_normalise(prediction) == _normalise(answer))


def _normalise(text: str) -> list[str]:
    words = _PUNCTUATION.sub("", text.lower()).split()
    # A text of articles only keeps them: the option letter "A" is an answer, not an article.
    return [word for word in words if word not in ARTICLES] or words
