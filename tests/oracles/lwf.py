"""Slow float64 reference for learning without forgetting in generation: one answer token at a time."""

import numpy as np

from tests.oracles.subspace import as_float64
from tests.oracles.training import softmax


def divergence(p, q):
    """KL(p || q) of two distributions over the vocabulary."""
    total = 0.0
    for one, other in zip(p, q, strict=True):
        if one > 0.0:
            total += one * (np.log(one) - np.log(other))
    return total


def distillation(teacher, student, temperature):
    """T^2 times the mean over tokens of KL(softmax(z_teacher / T) || softmax(z_student / T)).

    Args:
        teacher, student: (n, vocabulary) logits of the answers' tokens.
    """
    total = 0.0
    for old, new in zip(as_float64(teacher), as_float64(student), strict=True):
        total += divergence(softmax(old / temperature), softmax(new / temperature))
    return temperature**2 * total / len(student)
