"""Slow float64 reference for elastic weight consolidation: one entry of one parameter at a time.

A parameter is an array of any shape by its name; the gradient of one record is a dictionary of such arrays.
"""

import numpy as np

from tests.oracles.subspace import as_float64


def fisher(gradients):
    """Diagonal of the empirical Fisher matrix: mean over records of the squared gradient of log p(answer | question).

    Args:
        gradients: one dictionary name -> array for each record.
    """
    found = {}
    for name, first in gradients[0].items():
        of_records = [as_float64(gradient[name]) for gradient in gradients]
        found[name] = np.zeros(np.shape(first))
        for index in np.ndindex(*np.shape(first)):
            total = 0.0
            for gradient in of_records:
                total += gradient[index] ** 2
            found[name][index] = total / len(gradients)
    return found


def online(fishers, gamma):
    """F <- gamma F + F_t over domains in order, from F = 0."""
    running = {name: np.zeros(np.shape(each)) for name, each in fishers[0].items()}
    for one in fishers:
        for name in running:
            running[name] = gamma * running[name] + as_float64(one[name])
    return running


def penalty(theta, fishers, optima, strength):
    """strength / 2 times the sum over past domains t and entries j of F_tj (theta_j - theta*_tj)^2."""
    total = 0.0
    for one, optimum in zip(fishers, optima, strict=True):
        for name in theta:
            F, now, then = as_float64(one[name]), as_float64(theta[name]), as_float64(optimum[name])
            for index in np.ndindex(*now.shape):
                total += F[index] * (now[index] - then[index]) ** 2
    return strength / 2.0 * total


def penalty_gradient(theta, fishers, optima, strength):
    """Derivative of `penalty` by every entry: strength times the sum over t of F_tj (theta_j - theta*_tj)."""
    found = {}
    for name in theta:
        found[name] = np.zeros(np.shape(theta[name]))
        for one, optimum in zip(fishers, optima, strict=True):
            F, now, then = as_float64(one[name]), as_float64(theta[name]), as_float64(optimum[name])
            for index in np.ndindex(*now.shape):
                found[name][index] += strength * F[index] * (now[index] - then[index])
    return found
