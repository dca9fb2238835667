"""Slow reference for replay: Algorithm R by its definition, its exact distribution, and the joint mean loss."""

from fractions import Fraction


def reservoir(references, capacity, slot_of):
    """What Algorithm R holds after all references, one by one.

    `slot_of(n)` is the uniform draw from 0 to n - 1 for the n-th reference, asked for only where the buffer is full.
    """
    held = []
    n = 0
    for reference in references:
        n = n + 1
        if n <= capacity:
            held.append(reference)
        else:
            slot = slot_of(n)
            if slot < capacity:
                held[slot] = reference
    return held


def reservoir_distribution(num_references, capacity):
    """Exact probability of every set of references 0 to n - 1 that may be held, by following all draws."""
    outcomes = {(): Fraction(1)}
    for reference in range(num_references):
        n = reference + 1
        following = {}
        for held, probability in outcomes.items():
            if n <= capacity:
                after = (*held, reference)
                following[after] = following.get(after, Fraction(0)) + probability
                continue
            for slot in range(n):
                after = list(held)
                if slot < capacity:
                    after[slot] = reference
                after = tuple(after)
                following[after] = following.get(after, Fraction(0)) + probability / n
        outcomes = following
    sets = {}
    for held, probability in outcomes.items():
        key = frozenset(held)
        sets[key] = sets.get(key, Fraction(0)) + probability
    return sets


def chi_square(counts, probabilities):
    """Sum over all outcomes of (observed - expected)^2 / expected."""
    total = sum(counts.get(key, 0) for key in probabilities)
    value = 0.0
    for key, probability in probabilities.items():
        expected = total * float(probability)
        value += (counts.get(key, 0) - expected) ** 2 / expected
    return value


def joint_mean_loss(new, buffered):
    """Mean over the answer tokens of both, each a list of conversations, each a list of its tokens' losses."""
    total = 0.0
    count = 0
    for conversations in (new, buffered):
        for tokens in conversations:
            for loss in tokens:
                total += float(loss)
                count += 1
    return total / count
