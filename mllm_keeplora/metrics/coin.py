"""The official CoIN scoring rules, quirks included.

Source: the eval scripts of CoIN (arXiv 2403.08350), of its first release (llava/eval/CoIN) and of the later one
(ETrain/Eval/LLaVA/CoIN), which agree. TextVQA is in `vqa`. A prediction arrives stripped of outer whitespace.
"""

import re

OPTIONS = ("A", "B", "C", "D", "E")
_LONE_CHARACTER = re.compile(r"\b\w\b")


def score_scienceqa(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade an option letter: the first character of the prediction that stands alone, upper-cased.

    So "b" and "The answer is B." are B, but "I think B" is I, and "a cat" is A. Without a lone character the score is
    0: the random guess of LLaVA's first script is switched off in CoIN's. (CoIN first tests for "B" and for "B. ...",
    which is the same letter.)

    Raises:
        ValueError: the answer is not a letter from A to E.
    """
    if answer not in OPTIONS:
        raise ValueError(f"the answer to a ScienceQA question must be one of {', '.join(OPTIONS)}, got {answer!r}")
    lone = _LONE_CHARACTER.search(prediction)
    return float(lone is not None and lone[0].upper() == answer)


def score_imagenet(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a class name by containment, of either in the other and with case; an empty prediction passes."""
    return float(answer in prediction or prediction in answer)


def score_gqa(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a GQA answer by equality once the prediction is lower-cased and has lost its last dots.

    The answer is taken as it is. Source: `convert_gqa_for_eval.py`, then the accuracy of the GQA authors' `eval.py`.
    """
    return float(prediction.rstrip(".").lower().removeprefix(" ") == answer)


def score_upper(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade by equality after upper-casing; punctuation counts, and "Unanswerable" has no rule.

    So CoIN grades VizWiz and VQAv2, by one answer and not ten, and UCIT all that is no caption (the eval scripts of
    HiDe-LLaVA, arXiv 2503.12941, used unchanged by MCITlib and KeepLoRA).
    """
    return float(prediction.upper() == answer.upper())


def score_ocrvqa(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade an OCR-VQA answer by equality after lower-casing; a prediction that contains "Unanswerable" scores 0."""
    return float("Unanswerable" not in prediction and prediction.lower() == answer.lower())


def score_grounding(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a box by its overlap with the answer's box: intersection over union above 0.5, exactly 0.5 is too little.

    A box is [x1, y1, x2, y2]: left, top, right, bottom as shares of the side of the image padded to a square. Corners
    in another order, [x, y, width, height], pixels and text around the box are not understood.

    The prediction loses its brackets and then its first and its last character, whatever they are: of "[0.1, 0.2, 0.3,
    0.45]" the numbers .1, 0.2, 0.3 and 0.4 are read, and x1 of "[1.0, ...]" is 0. Anything but four numbers scores 0.
    The official script multiplies all numbers by the image's longer side, which changes nothing but rounding.

    Raises:
        ValueError: the answer is not a box (in CoIN's files it is `answer_bbox`).
    """
    gold = _numbers(_without_brackets(answer))
    if gold is None:
        raise ValueError(f"the answer of a grounding question must be a box like [0.1, 0.2, 0.3, 0.4], got {answer!r}")
    box = _numbers(_without_brackets(prediction.removeprefix(" "))[1:-1])
    return float(box is not None and _intersection_over_union(box, gold) > 0.5)


def _without_brackets(text: str) -> str:
    return text.replace("[", "").replace("]", "")


def _numbers(text: str) -> list[float] | None:
    """Return the four numbers between commas, or None if it is not four or not numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def _intersection_over_union(box: list[float], gold: list[float]) -> float:
    width = max(0, min(box[2], gold[2]) - max(box[0], gold[0]))
    height = max(0, min(box[3], gold[3]) - max(box[1], gold[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, gold)]
    union = areas[0] + areas[1] - width * height
    return width * height / union if union > 0 else 0.0
