"""Slow float64 reference for the prototypes of KeepLoRA+, written from the equations alone."""

import math


def unit(vector):
    """A vector divided by its length."""
    length = math.sqrt(sum(float(value) ** 2 for value in vector))
    return [float(value) / length for value in vector]


def start(features, labels, num_classes):
    """Class means of unit-length features, made of unit length: one row for each class."""
    rows = []
    for place in range(num_classes):
        own = [unit(feature) for feature, label in zip(features, labels, strict=True) if label == place]
        rows.append(unit([sum(column) / len(own) for column in zip(*own, strict=True)]))
    return rows


def logits(features, prototypes, scale):
    """scale * cos(f_i, P_c) for every picture i and class c."""
    found = []
    for feature in features:
        seen = unit(feature)
        found.append([scale * sum(a * b for a, b in zip(seen, unit(p), strict=True)) for p in prototypes])
    return found
