"""Slow float64 reference for DAC (rank-1 expert pool in a single LoRA): routers, votes, masks and AGO written out.

One layer at a time. A (r, d_in) has the experts' a_i as rows, B (d_out, r) their b_i as columns; s = alpha / r. Where
experts are equal, the first counts.
"""

import numpy as np


def prompt_mean(x, counts):
    """Mean of the tokens x (t, d_in) of one sample that count."""
    total, number = np.zeros(x.shape[1]), 0
    for token, does_count in zip(x, counts, strict=True):
        if does_count:
            total, number = total + token, number + 1
    return total / number


def chances(phi, R, c):
    """p = softmax(R phi + c) of one sample."""
    logits = np.array([sum(R[i, j] * phi[j] for j in range(len(phi))) + c[i] for i in range(len(R))])
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def leading(values, k):
    """0/1 vector of the k largest values."""
    mask, left = np.zeros(len(values)), list(range(len(values)))
    for _ in range(k):
        best = max(left, key=lambda i: (values[i], -i))
        mask[best] = 1
        left.remove(best)
    return mask


def votes(phis, R, c, k):
    """v of a batch: each sample gives one vote to each of its k likeliest experts."""
    return sum((leading(chances(phi, R, c), k) for phi in phis), np.zeros(len(R)))


def added(x, A, B, s, mask):
    """What the active experts add to a layer's outputs for x (n, d_in): s B[:, M] A[M, :] x."""
    found = np.zeros((len(x), len(B)))
    for n in range(len(x)):
        for i in range(len(A)):
            if mask[i]:
                found[n] += s * B[:, i] * float(A[i] @ x[n])
    return found


def gradients(x, g, A, B, s, mask):
    """Gradients of A and B by hand, from g = dL/dy (n, d_out)."""
    dA, dB = np.zeros(A.shape), np.zeros(B.shape)
    for n in range(len(x)):
        for i in range(len(A)):
            if mask[i]:
                dA[i] += s * float(B[:, i] @ g[n]) * x[n]
                dB[:, i] += s * float(A[i] @ x[n]) * g[n]
    return dA, dB


def ago(layers, reduction="mean"):
    """L_ago of (current columns, past columns) by layer: mean over layers of the mean or sum of |b_i . b_j|."""
    found = []
    for current, past in layers:
        pairs = [abs(float(current[:, i] @ past[:, j])) for i in range(current.shape[1]) for j in range(past.shape[1])]
        found.append(0.0 if not pairs else sum(pairs) / (len(pairs) if reduction == "mean" else 1))
    return sum(found) / len(found)


def kept_update(A, B, s, n, k):
    """What a finished domain adds to W: the k experts with the most votes n, as a sum of rank-1 products."""
    keep = leading(n, k)
    return sum(s * np.outer(B[:, i], A[i]) for i in range(len(A)) if keep[i])
