"""Dual encoders by slow float64 loops: loss (12), answers, prototypes, features that count, layer scales, rates.

Written from the specification alone; the algebra of subspaces is in `subspace`, the metrics are in `score_matrix`.
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
    """The class that answers: the one of the largest logit."""
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


def layer_scales(blocks: Sequence[int], low: float, scaled: bool = True) -> dict[int, float]:
    """Equation (11) for the adapted blocks of ONE tower: a ramp from `low` to 1, or 1 everywhere in another tower."""
    adapted = sorted(set(blocks))
    if not scaled or len(adapted) == 1:
        return dict.fromkeys(adapted, 1.0)
    return {block: low + (1.0 - low) * place / (len(adapted) - 1) for place, block in enumerate(adapted)}


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
