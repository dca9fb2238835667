"""Slow float64 reference of gradient surgery within one matrix, as Ortho-LoRA (arXiv 2601.09684) does it per factor."""

import numpy as np


def projected(gradients, orders, eps=0.0):
    """Each task's gradient after it gave up, one other task after another, what runs against that task's own gradient.

    `orders[i]` lists the other tasks in the order in which task i meets them; references are never projected ones.
    """
    found = []
    for task, gradient in enumerate(gradients):
        rest = np.array(gradient, dtype=np.float64)
        for other in orders[task]:
            reference = np.array(gradients[other], dtype=np.float64)
            product = sum(a * b for a, b in zip(rest.ravel(), reference.ravel(), strict=True))
            if product < 0:
                rest = rest - product / (sum(b * b for b in reference.ravel()) + eps) * reference
        found.append(rest)
    return found


def combined(gradients, orders, weights, eps=0.0):
    """What the factor's step descends: the weighted sum of the tasks' projected gradients."""
    return sum(weight * rest for weight, rest in zip(weights, projected(gradients, orders, eps), strict=True))
