"""Pure scorers: of one answer, and of a score matrix. Strings and numbers only; knows no model, file or data set."""

from mllm_keeplora.metrics.blind import BlindAnswerer
from mllm_keeplora.metrics.matrix import ScoreMatrix, general_retention
from mllm_keeplora.metrics.mistakes import Mistake, mistake
from mllm_keeplora.metrics.scorers import SCORERS, SET_SCORERS, UNGRADED, Grades, grade, score

__all__ = [
    "SCORERS",
    "SET_SCORERS",
    "UNGRADED",
    "BlindAnswerer",
    "Grades",
    "Mistake",
    "ScoreMatrix",
    "general_retention",
    "grade",
    "mistake",
    "score",
]
