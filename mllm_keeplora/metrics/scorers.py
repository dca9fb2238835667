"""The names under which a benchmark asks for a scoring rule."""

from collections.abc import Callable

from mllm_keeplora.metrics import dcl, ucit, words

Scorer = Callable[[str, str, str, str], float]

SCORERS: dict[str, Scorer] = {
    "dcl_rs": dcl.score_rs,
    "dcl_med": dcl.score_med,
    "dcl_ad": dcl.score_rs,
    "dcl_sci": dcl.score_sci,
    "dcl_fin": dcl.score_fin,
    "ucit_exact": ucit.score_exact_upper,
    "exact": words.score_exact,
    "strict": words.score_strict,
}


def score(name: str, prediction: str, answer: str, question: str = "", image: str = "") -> float:
    """Grade one prediction by a named rule.

    Args:
        name: a key of `SCORERS`.
        prediction: what the model wrote, outer whitespace stripped.
        answer: the reference answer.
        question: the question as asked; only some rules read it.
        image: path of the image; only some rules read its file name.

    Returns:
        The score in [0, 1].

    Raises:
        ValueError: no rule has this name.
    """
    if name not in SCORERS:
        raise ValueError(f"unknown scorer {name!r}; known scorers: {', '.join(sorted(SCORERS))}")
    return SCORERS[name](prediction, answer, question, image)
