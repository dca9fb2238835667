"""Slow float64 reference for branches weighed by likeness (DISCO, HiDe), and for what released code makes of it.

A question is (words, pictures), each (d,), of frozen parts. `wanted` is text, picture, or both.
"""

import math

import numpy as np

from tests.oracles.subspace import as_float64

FLOOR = 1e-3


def mean(questions):
    """The mean of a domain's questions, (d,), in float64."""
    total = np.zeros(len(questions[0]))
    for question in questions:
        total = total + as_float64(question)
    return total / len(questions)


def length(x):
    return math.sqrt(sum(float(v) * float(v) for v in x))


def cosine(x, y, center):
    """Cosine of two vectors about a center; zero where one of them is nothing.

    What the center leaves of a vector counts as no shorter than FLOOR of it, as rounding is left of vectors alike.
    """
    x, y = as_float64(x), as_float64(y)
    if length(x) == 0.0 or length(y) == 0.0:
        return 0.0
    lengths = max(length(x - center), FLOOR * length(x)) * max(length(y - center), FLOOR * length(y))
    return sum(a * b for a, b in zip(x - center, y - center, strict=True)) / lengths


def likeness(question, anchors, wanted, centered):
    """How alike a question is to every domain: the cosine with its mean, or the mean of both modalities' cosines.

    Args:
        question, anchors: (words, pictures), of each domain.
        centered: measure from the mean of the domains' means that are not nothing; nothing stays nothing.
    """
    found = []
    for anchor in anchors:
        cosines = []
        for place, name in enumerate(("text", "picture")):
            if wanted not in (name, "both"):
                continue
            x, m = as_float64(question[place]), as_float64(anchor[place])
            there = [as_float64(each[place]) for each in anchors if np.any(each[place])]
            center = sum(there) / len(there) if centered and there else np.zeros(len(x))
            cosines.append(cosine(x, m, center))
        found.append(sum(cosines) / len(cosines))
    return found


def weights(question, anchors, wanted, temperature, centered=False, top1=False):
    """g_t = softmax_t(likeness / temperature); of the best alone with `top1`."""
    alike = likeness(question, anchors, wanted, centered)
    if top1:
        return np.array([float(t == int(np.argmax(alike))) for t in range(len(alike))])
    powers = [math.exp((each - max(alike)) / temperature) for each in alike]
    return np.array([each / sum(powers) for each in powers])


def weighed_delta(branches, g):
    """sum_t g_t s_t B_t A_t; branches are (A, B, s). Fused blocks have every g_t = 1 (`fusion: products`)."""
    return sum(w * s * (as_float64(b) @ as_float64(a)) for w, (a, b, s) in zip(g, branches, strict=True))


# -- released readings: each with its fault ------------------------------------------------------------------------


def fused_by_sums(branches):
    """(sum_t s B_t) (sum_t A_t): the released HiDe, whose experts are summed apart; all s are alike."""
    s = branches[0][2]
    return s * sum(as_float64(b) for _, b, _ in branches) @ sum(as_float64(a) for a, _, _ in branches)


def cross_terms(branches):
    """sum over i != j of s B_i A_j: what sums have and products do not."""
    total = 0.0
    for i, (_, b, s) in enumerate(branches):
        for j, (a, _, _) in enumerate(branches):
            if i != j:
                total = total + s * (as_float64(b) @ as_float64(a))
    return total


def bfloat16(x):
    """Round to the nearest number of eight significant bits, ties to even."""
    mantissa, exponent = np.frexp(as_float64(x))
    return np.ldexp(np.rint(mantissa * 256.0) / 256.0, exponent)


def stalled_mean(batches):
    """The running mean of the released HiDe: itself and its count in bfloat16, from nothing that counts as one."""
    anchor, count = np.zeros(len(batches[0][0])), 1.0
    for batch in batches:
        now = float(bfloat16(count + len(batch)))
        anchor = bfloat16((anchor * count + as_float64(batch).sum(axis=0)) / now)
        count = now
    return anchor, count


def stalled_sum(batches):
    """The "mean" of DISCO in MCITlib, whose count never moves: a sum in bfloat16."""
    anchor = np.zeros(len(batches[0][0]))
    for batch in batches:
        anchor = bfloat16(anchor + as_float64(batch).sum(axis=0))
    return anchor
