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


# -- other routers -------------------------------------------------------------------------------------------------


def by_prototypes(question: np.ndarray, domains: list[np.ndarray], words: int) -> np.ndarray:
    """Cosine of a question with every domain's mean, pictures made as long as words in both."""

    def whole(features: np.ndarray) -> np.ndarray:
        said, seen = features[:words], features[words:]
        longer = np.linalg.norm(said) / np.linalg.norm(seen) if np.any(seen) else 0.0
        return np.concatenate([said, longer * seen])

    found, x = [], whole(question)
    for questions in domains:
        m = whole(sum(questions) / len(questions))
        found.append(x @ m / (np.linalg.norm(x) * np.linalg.norm(m)))
    return np.array(found)


def by_least_squares(question: np.ndarray, domains: list[np.ndarray], ridge: float) -> np.ndarray:
    """h' W with W = (sum h h' + gamma I)^-1 sum h y', y the one-hot domain, gamma a share of the mean square."""
    rows = np.concatenate(domains)
    labels = np.concatenate([np.full(len(each), number) for number, each in enumerate(domains)])
    y = np.eye(len(domains))[labels]
    gamma = ridge * np.square(rows).sum() / rows.shape[1]
    return question @ np.linalg.inv(rows.T @ rows + gamma * np.eye(rows.shape[1])) @ rows.T @ y


def highest(question: np.ndarray, domains: list[np.ndarray], scores, reject: float | None = None) -> int | None:
    """The domain of the highest score, None for the base.

    A question is none of a domain's where its score is below the lowest but 1 - reject of the domain's held-out ones.
    """
    parts = [split(questions) for questions in domains]
    fitted = [part[0] for part in parts]
    found = scores(question, fitted)
    if reject is not None:
        gaps = [[1 - scores(each, fitted)[own] for each in held] for own, (_, held) in enumerate(parts)]
        if not any(1 - found[own] <= np.quantile(gaps[own], reject) for own in range(len(domains))):
            return None
    return int(np.argmax(found))
