"""Dual encoders by slow float64 loops: loss (12), answers, prototypes, kept features, bases, layer scales, rates, metrics.

Everything here is written from the specification of the method and knows nothing of the library. Matrices stand as
PyTorch stores them: a weight is `[out, in]`, bases are rows of the input space.
"""

import math
from collections.abc import Sequence

import numpy as np

def unit(vector) -> np.ndarray:
    """The vector divided by its length."""
    vector = np.asarray(vector, dtype=np.float64)
    return vector / math.sqrt(float((vector * vector).sum()))


def cosine(a, b) -> float:
    """The cosine of two vectors."""
    return float((unit(a) * unit(b)).sum())


def class_feature(features) -> np.ndarray:
    """One class from the features of its prompts: each of unit length, then their mean, of unit length again."""
    return unit(sum(unit(feature) for feature in features) / len(features))


def class_logits(image, texts, log_scale: float, bias: float = 0.0) -> np.ndarray:
    """The logits `z = exp(log_scale) f g + bias` of one picture against every class text."""
    return np.array([math.exp(log_scale) * cosine(image, text) + bias for text in texts])


def with_prototypes(logits, image, prototypes, scale: float = 30.0) -> np.ndarray:
    """KeepLoRA+ adds `scale cos(f, P_c)` to the logit of every class."""
    return np.array([z + scale * cosine(image, p) for z, p in zip(logits, prototypes, strict=True)])


def picture_loss(logits, label: int, allowed: Sequence[bool] | None = None) -> float:
    """Cross entropy of one picture over the classes that it may have: one direction, picture to texts."""
    chosen = [c for c in range(len(logits)) if allowed is None or allowed[c]]
    assert label in chosen
    top = max(logits[c] for c in chosen)
    return math.log(sum(math.exp(logits[c] - top) for c in chosen)) + top - logits[label]


def contrastive_loss(images, texts, log_scale: float, labels, bias: float = 0.0, allowed=None) -> float:
    """Loss (12): the mean over pictures of their cross entropies; a label of -100 marks a picture that is idle."""
    losses = [
        picture_loss(class_logits(image, texts, log_scale, bias), label, None if allowed is None else allowed[i])
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
        if label != -100
    ]
    return sum(losses) / len(losses)


def softmax(logits) -> np.ndarray:
    """The probabilities of the classes."""
    logits = np.asarray(logits, dtype=np.float64)
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def likeliest(logits) -> int:
    """The class that answers: the largest logit, the first in the list's order where several are equal."""
    best = 0
    for c in range(1, len(logits)):
        if logits[c] > logits[best]:
            best = c
    return best


def class_prototypes(features, labels, classes: int) -> np.ndarray:
    """The start of `P`: for each class the mean of its pictures' unit features, of unit length again."""
    rows = []
    for c in range(classes):
        own = [unit(f) for f, y in zip(features, labels, strict=True) if y == c]
        if not own:
            raise ValueError(f"class {c} has no picture")
        rows.append(unit(sum(own) / len(own)))
    return np.stack(rows)


def text_rows(hidden, mask, padding: bool) -> np.ndarray:
    """The inputs of a text layer that count as features: up to the end mark, or with `padding` all positions."""
    return np.stack([row for i, text in enumerate(hidden) for j, row in enumerate(text) if padding or mask[i][j]])


def second_moment(rows) -> np.ndarray:
    """The Gram matrix of features, summed row by row."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in np.asarray(rows, dtype=np.float64):
        total += np.outer(row, row)
    return total


def select(energies, total: float, covered: float, threshold: float) -> int:
    """The smallest m with `covered + (first m energies) / total >= threshold`."""
    share, m = covered, 0
    while share < threshold - 1e-12 and m < len(energies):
        share += energies[m] / total
        m += 1
    return m


def weight_basis(weight, threshold: float, side: str = "input", rule: str = "reach") -> np.ndarray:
    """Equation (1): leading directions of a weight as rows, of its input side or of its output side as published.

    With the rule `below_legacy` one direction fewer is kept, but never none.
    """
    weight = np.asarray(weight, dtype=np.float64)
    if side == "output_legacy" and weight.shape[0] != weight.shape[1]:
        raise ValueError("output directions fit the inputs of square weights only")
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    rank = select(s**2, float((s**2).sum()), 0.0, threshold)
    if rule == "below_legacy":
        rank = max(rank - 1, 1)
    return vt[:rank] if side == "input" else u.T[:rank]


def residual(basis, matrix) -> np.ndarray:
    """Equation (3) for rows of the input space: what is left of `matrix` outside the basis."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return matrix - matrix @ basis.T @ basis


def down_projection(gradient, basis, rank: int) -> np.ndarray:
    """Equation (4): the leading input directions of the residual gradient, a frozen A of `[rank, in]`."""
    return np.linalg.svd(residual(basis, gradient), full_matrices=False)[2][:rank]


def up_projection(gradient, basis, rank: int) -> np.ndarray:
    """Equation (5a): B that starts as the residual gradient seen through A, `[out, rank]`."""
    u, s, _ = np.linalg.svd(residual(basis, gradient), full_matrices=False)
    return u[:, :rank] * s[:rank]


def grow(basis, features, threshold: float) -> np.ndarray:
    """Equations (8) to (10): the basis and the leading feature directions that it lacks."""
    features = np.asarray(features, dtype=np.float64)
    energy, left = float((features**2).sum()), residual(basis, features)
    _, s, vt = np.linalg.svd(left, full_matrices=False)
    m = select(s**2, energy, (energy - float((left**2).sum())) / energy, threshold)
    return np.concatenate([basis, vt[:m]])[: features.shape[1]]


def layer_scales(blocks: Sequence[int], low: float, scaled: bool = True) -> dict[int, float]:
    """Equation (11) for the adapted blocks of ONE tower: a ramp from `low` to 1, or 1 everywhere in another tower."""
    first, count = min(blocks), max(blocks) - min(blocks) + 1
    if not scaled or count == 1:
        return dict.fromkeys(blocks, 1.0)
    return {block: low + (1.0 - low) * (block - first) / (count - 1) for block in blocks}


def one_cycle(step: int, steps: int, peak: float) -> tuple[float, float]:
    """The rate and AdamW's first beta at a step: a rise over 30 % of the steps, then a fall, both by a half cosine."""

    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    start, last = peak / 25, peak / 25 / 1e4
    top = 0.3 * steps - 1
    if step <= top:
        return between(start, peak, step / top), between(0.95, 0.85, step / top)
    share = (step - top) / (steps - 1 - top)
    return between(peak, last, share), between(0.85, 0.95, share)


def transfer(scores) -> float:
    """The mean over data sets from the second on of their mean score before they were learnt."""
    columns = [sum(scores[t][i] for t in range(i)) / i for i in range(1, len(scores))]
    return sum(columns) / len(columns)


def average(scores) -> float:
    """The mean over data sets of their mean score after every task."""
    count = len(scores)
    return sum(sum(row[i] for row in scores) / count for i in range(count)) / count


def last(scores) -> float:
    """The mean score after the last task."""
    return sum(scores[-1]) / len(scores[-1])
