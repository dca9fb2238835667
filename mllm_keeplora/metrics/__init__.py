"""Pure scorers: of one answer, and of a score matrix. Strings and numbers only; knows no model, file or data set."""

from mllm_keeplora.metrics.blind import BlindAnswerer
from mllm_keeplora.metrics.matrix import ScoreMatrix, general_retention
from mllm_keeplora.metrics.scorers import SCORERS, score

__all__ = ["SCORERS", "BlindAnswerer", "ScoreMatrix", "general_retention", "score"]
