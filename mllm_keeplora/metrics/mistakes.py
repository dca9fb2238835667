"""What kind of mistake an answer is: a second look for reports, which changes no score."""

import re
from collections.abc import Sequence
from typing import Literal

from mllm_keeplora.metrics.vqa import NUMBERS
from mllm_keeplora.metrics.words import score_exact, score_strict

Mistake = Literal["blank", "truncated", "format", "off_by_one", "wrong"]
_WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+")
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}")
_OPTION_A = re.compile(r"(?<!\w)a(?=[).:,]|\W*$)")


def mistake(
    prediction: str, answer: str | Sequence[str], hit_token_limit: bool, is_right: bool | None = None
) -> Mistake | None:
    """Say what went wrong with a prediction; the first of these tests that holds decides.

    1. None: it is right.
    2. "blank": nothing but whitespace.
    3. "truncated": the model was stopped by the token limit; what stands there is not all it would have said.
    4. "format": the words are those of the answer, or hold them side by side ("it is a red car" for "red car"). An "a"
       counts as the option letter only at the end or before one of . , : ).
    5. "off_by_one": both are whole numbers, in digits or as a word up to ten, and differ by one.
    6. "wrong": anything else.

    Args:
        prediction: what the model wrote.
        answer: the reference answer; of several, any will do.
        hit_token_limit: whether the prediction is as long as it was allowed to be.
        is_right: what the scoring rule said; None: right is what equals the answer but for case and outer whitespace.
    """
    answers = [answer] if isinstance(answer, str) else answer
    if is_right is None:
        is_right = any(score_exact(prediction, each) for each in answers)
    if is_right:
        return None
    if not prediction.strip():
        return "blank"
    if hit_token_limit:
        return "truncated"
    if any(score_strict(prediction, each) or _holds(prediction, each) for each in answers):
        return "format"
    number = _whole_number(prediction)
    if any(None not in (number, other) and abs(number - other) == 1 for other in map(_whole_number, answers)):
        return "off_by_one"
    return "wrong"


def _holds(prediction: str, answer: str) -> bool:
    words, wanted = (_WORD.findall(text.lower()) for text in (prediction, answer))
    if wanted == ["a"]:
        return _OPTION_A.search(prediction.lower()) is not None
    return f" {' '.join(wanted)} " in f" {' '.join(words)} "


def _whole_number(text: str) -> int | None:
    text = text.strip().rstrip(".").replace(",", "").lower()
    text = NUMBERS.get(text, text)
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else None
