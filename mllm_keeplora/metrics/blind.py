"""An answerer that never looks at the image: what it scores is what the question text alone gives away."""

from collections import Counter, defaultdict
from collections.abc import Iterable


class BlindAnswerer:
    """Answer a question with the most frequent training answer to the same question text.

    An unseen question gets the most frequent answer of all; among equally frequent answers the first in
    lexicographic order wins.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Count the answers.

        Args:
            pairs: (question, answer) of every training record.

        Raises:
            ValueError: there are no pairs.
        """
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question, answer in pairs:
            counts[question][answer] += 1
        if not counts:
            raise ValueError("a blind answerer needs at least one (question, answer) pair, got none")
        self._by_question = {question: _most_frequent(answers) for question, answers in counts.items()}
        self._overall = _most_frequent(sum(counts.values(), Counter()))

    def answer(self, question: str) -> str:
        """Return the answer that is most frequent for this question text, or overall if it was never seen."""
        return self._by_question.get(question, self._overall)


def _most_frequent(answers: Counter[str]) -> str:
    return min(answers, key=lambda answer: (-answers[answer], answer))
