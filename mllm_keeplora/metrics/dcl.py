"""The official MLLM-DCL scoring rules, quirks included: published numbers depend on every one of them.

Source: the per-domain eval scripts of MLLM-CL (arXiv 2506.05453), which MCITlib and KeepLoRA use unchanged.
A prediction arrives as in the prediction file: outer whitespace stripped, nothing else touched.
"""

EXACT_IMAGE_PREFIXES = ("AI2D", "TQA", "VQA", "SciVerse")


def score_rs(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade an RS or AD answer: containment, whose form depends on where spaces are.

    An answer without a space loses its dots first; the prediction never does, so "0.5" does not match itself.
    """
    if _is_unanswerable(prediction):
        return 0.0
    prediction, answer = prediction.lower(), answer.lower()
    if " " in answer:
        return float(answer in prediction)
    answer = answer.replace(".", "")
    if " " not in prediction:
        return float(answer in prediction)
    return float(any(part in prediction for part in (f" {answer}", f"{answer} ", f"{answer}.", f"{answer},")))


def score_med(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a Med answer: the answer is contained in the prediction, inside a word too ("no" in "unknown")."""
    return float(not _is_unanswerable(prediction) and answer.lower() in prediction.lower())


def score_sci(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a Sci answer by the data set its image file name starts with.

    AI2D, TQA, VQA and SciVerse want equality. Anything else is MapQA: a "Which states" question gets the share of
    listed answers that were predicted (commas only, spaces are not trimmed, extra items are free), others containment.
    """
    if _is_unanswerable(prediction):
        return 0.0
    prediction, answer = prediction.lower(), answer.lower()
    if image.split("/")[-1].split("_")[0] in EXACT_IMAGE_PREFIXES:
        return float(prediction == answer)
    if "Which states" in question:
        answers, predictions = answer.split(","), prediction.split(",")
        return sum(item in predictions for item in answers) / len(answers)
    return float(answer in prediction)


def score_fin(prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade a Fin answer: equality once spaces and dots are removed from the prediction, not from the answer."""
    if _is_unanswerable(prediction):
        return 0.0
    return float(prediction.lower().replace(" ", "").replace(".", "") == answer.lower())


def _is_unanswerable(prediction: str) -> bool:
    """Tell whether the official scripts skip this prediction: it scores 0 and still counts. The capital U matters."""
    return "Unanswerable" in prediction
