"""The names under which a benchmark asks for a scoring rule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mllm_keeplora.metrics import acl, coin, dcl, vista, vqa, words
from mllm_keeplora.metrics.captions import captions

Answer = str | Sequence[str]
Scorer = Callable[..., float]  # of prediction, answer, question and image; the score is in [0, 1]
SetScorer = Callable[[Sequence[str], Sequence[Answer]], tuple[tuple[float, ...], float, dict[str, float]]]

UNGRADED = {**acl.UNGRADED, **vista.UNGRADED}
SCORERS: dict[str, Scorer] = {
    "dcl_rs": dcl.score_rs,
    "dcl_med": dcl.score_med,
    "dcl_ad": dcl.score_rs,
    "dcl_sci": dcl.score_sci,
    "dcl_fin": dcl.score_fin,
    "ucit_exact": coin.score_upper,
    "caption_mean": captions.score_caption,
    "coin_scienceqa": coin.score_scienceqa,
    "coin_textvqa": vqa.score_soft,
    "coin_imagenet": coin.score_imagenet,
    "coin_gqa": coin.score_gqa,
    "coin_vizwiz": coin.score_upper,
    "coin_grounding": coin.score_grounding,
    "coin_vqav2": coin.score_upper,
    "coin_ocrvqa": coin.score_ocrvqa,
    "vqa_soft": vqa.score_soft,
    "ocrbench": acl.score_ocrbench,
    "cvbench_count": acl.score_count,
    "vista_number": vista.score_number,
    "exact": words.score_exact,
    "strict": words.score_strict,
}
SET_SCORERS: dict[str, SetScorer] = {"caption_mean": captions.grade_captions}
SEVERAL_ANSWERS = frozenset({"caption_mean", "coin_textvqa", "vqa_soft", "ocrbench"})  # these know more than one


@dataclass(frozen=True)
class Grades:
    """Say what a set of answers is worth.

    Args:
        scores: of each answer, 1 = fully right. In [0, 1], except for `caption_mean`, where CIDEr may lead beyond.
        percent: of the whole set; the mean of the scores, unless the rule looks at the set at once.
        parts: name -> percent of what `percent` is the mean of; empty for most rules.
    """

    scores: tuple[float, ...]
    percent: float
    parts: dict[str, float]


def score(name: str, prediction: str, answer: Answer, question: str = "", image: str = "") -> float:
    """Grade one prediction by a named rule.

    Args:
        name: a key of `SCORERS`.
        prediction: what the model wrote, outer whitespace stripped.
        answer: the reference answer; several for a rule of `SEVERAL_ANSWERS`.
        question: the question as asked; only some rules read it.
        image: path of the image; only some rules read its file name.

    Returns:
        The score in [0, 1]. A rule of `SET_SCORERS` grades a set of one: use `grade` for those.

    Raises:
        ValueError: no rule has this name, it cannot be applied offline, or it knows one answer only.
    """
    if name in UNGRADED:
        raise ValueError(UNGRADED[name])
    if name not in SCORERS:
        raise ValueError(f"unknown scorer {name!r}; known scorers: {', '.join(sorted(SCORERS))}")
    if not isinstance(answer, str) and name not in SEVERAL_ANSWERS:
        raise ValueError(
            f"scorer {name!r} compares with one answer, got {len(answer)}: {answer!r}; "
            f"several are known to {', '.join(sorted(SEVERAL_ANSWERS))}"
        )
    return SCORERS[name](prediction, answer, question, image)


def grade(
    name: str, predictions: Sequence[str], answers: Sequence[Answer], questions: Sequence[str], images: Sequence[str]
) -> Grades:
    """Grade a set of predictions by a named rule. Arguments as for `score`, one of each per question.

    Raises:
        ValueError: as for `score`; the arguments differ in length, or there is nothing to grade.
    """
    lengths = {len(column) for column in (predictions, answers, questions, images)}
    if lengths == {0} or len(lengths) != 1:
        counted = f"{len(predictions)}, {len(answers)}, {len(questions)} and {len(images)}"
        raise ValueError(f"grade needs as many predictions as answers, questions and images, at least 1; got {counted}")
    if name in SET_SCORERS:
        return Grades(*SET_SCORERS[name](predictions, answers))
    rows = zip(predictions, answers, questions, images, strict=True)
    scores = tuple(score(name, *row) for row in rows)
    return Grades(scores, 100.0 * math.fsum(scores) / len(scores), {})
