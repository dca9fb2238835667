"""Which domain a question belongs to, in float64 by explicit inverses: all domains given at once."""

from __future__ import annotations

import numpy as np


def split(questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) -> those that means and covariance are fitted to, and those held out: every fourth."""
    held = [row for row in range(len(questions)) if row % 4 == 3]
    fitted = [row for row in range(len(questions)) if row % 4 != 3]
    return questions[fitted], questions[held]


def covariance(domains: list[np.ndarray], shrinkage: float) -> np.ndarray:
    """Covariance within domains, pooled over all questions and shrunk towards its diagonal: (d, d)."""
    d = domains[0].shape[1]
    total, count = np.zeros((d, d)), 0
    for questions in domains:
        mean = sum(questions) / len(questions)
        for question in questions:
            total += np.outer(question - mean, question - mean)
            count += 1
    pooled = total / count
    return (1 - shrinkage) * pooled + shrinkage * np.diag(np.diag(pooled))


def discriminants(question: np.ndarray, domains: list[np.ndarray], shared: np.ndarray) -> np.ndarray:
    """Linear discriminant of every domain, equal priors: x' S^-1 m - m' S^-1 m / 2."""
    inverse, found = np.linalg.inv(shared), []
    for questions in domains:
        mean = sum(questions) / len(questions)
        found.append(question @ inverse @ mean - mean @ inverse @ mean / 2)
    return np.array(found)


def distance(question: np.ndarray, questions: np.ndarray, shared: np.ndarray) -> float:
    """Mahalanobis distance of a question to the mean of a domain's."""
    gap = question - sum(questions) / len(questions)
    return float(np.sqrt(gap @ np.linalg.inv(shared) @ gap))


def chosen(
    question: np.ndarray, domains: list[np.ndarray], shrinkage: float, reject: float | None = None
) -> int | None:
    """The domain that answers a question, None for the base.

    Args:
        question: (d,).
        domains: (n, d) of each, held-out questions among them.
        shrinkage: of the covariance.
        reject: the quantile of a domain's held-out distances beyond which a question is none of its; None for never.
    """
    parts = [split(questions) for questions in domains]
    fitted = [part[0] for part in parts]
    shared = covariance(fitted, shrinkage)
    if reject is not None:
        inside = []
        for own, held in parts:
            limits = np.quantile([distance(each, own, shared) for each in held], reject)
            inside.append(distance(question, own, shared) <= limits)
        if not any(inside):
            return None
    return int(np.argmax(discriminants(question, fitted, shared)))
