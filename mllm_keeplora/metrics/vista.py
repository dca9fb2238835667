"""CL-VISTA's rule, which needs a judge model, and a rule of our own for its counts."""

import re

UNGRADED = {
    "vista_judge": (
        "vista_judge cannot be graded offline: the official script lets Qwen3-30B-A3B-Instruct-2507 give 0 to 5 points "
        "to each answer; question, gold answer and prediction that it is shown are the rows of the predictions file"
    ),
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
NUMBER = re.compile(rf"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)|\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def score_number(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade by the first number, in digits or as a word up to twenty; a rule of our own, not CL-VISTA's.

    The judge of CL-VISTA gives points to wrong counts too, so that its scores and these are not the same.
    """
    said, gold = _first(prediction), _first(answer)
    return float(said is not None and said == gold)


def _first(text: str) -> float | None:
    found = NUMBER.search(text)
    if found is None:
        return None
    word = found[0].lower()
    return float(WORDS.index(word)) if word in WORDS else float(word)
