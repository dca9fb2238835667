"""BLEU, ROUGE-L and CIDEr of the COCO caption tools by slow loops over lists of words, for one set.

Written from the papers and the constants of the official code: BLEU's 1e-15 and 1e-9, ROUGE's beta of 1.2, CIDEr's
sigma of 6 and its caption length, which counts pairs of neighbours. `items` is a list of (prediction, references).
"""

import math


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def bleu(items, n):
    """BLEU-n of the set: geometric mean of the precisions, clipped, times the brevity penalty."""
    product, predicted_length, reference_length = 1.0, 0, 0
    for size in range(1, n + 1):
        right = tried = 0
        for prediction, references in items:
            grams = ngrams(prediction, size)
            tried += len(grams)
            for gram in set(grams):
                most = max(ngrams(reference, size).count(gram) for reference in references)
                right += min(grams.count(gram), most)
        product *= (right + 1e-15) / (tried + 1e-9)
    for prediction, references in items:
        predicted_length += len(prediction)
        lengths = sorted(len(reference) for reference in references)
        reference_length += min(lengths, key=lambda length: abs(length - len(prediction)))
    score = product ** (1 / n)
    ratio = (predicted_length + 1e-15) / (reference_length + 1e-9)
    return score if ratio >= 1 else score * math.exp(1 - 1 / ratio)


def common(left, right):
    """Length of the longest common subsequence."""
    if not left or not right:
        return 0
    if left[0] == right[0]:
        return 1 + common(left[1:], right[1:])
    return max(common(left[1:], right), common(left, right[1:]))


def rouge(items):
    """ROUGE-L of the set: the best precision and the best recall, each from whatever reference gives it."""
    total = 0.0
    for prediction, references in items:
        precision = max(common(prediction, reference) / len(prediction) for reference in references)
        recall = max(common(prediction, reference) / len(reference) for reference in references)
        if precision and recall:
            total += (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return total / len(items)


def cider(items):
    """CIDEr of the set, ten times the mean similarity of weighted n-grams."""
    return sum(cider_item(items, *item) for item in items) / len(items)


def cider_item(items, prediction, references):
    total = 0.0
    for reference in references:
        gap = len(ngrams(prediction, 2)) - len(ngrams(reference, 2))
        for n in range(1, 5):
            mine, theirs = weights(items, prediction, n), weights(items, reference, n)
            overlap = sum(min(mine[gram], theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram in mine)
            norms = [math.sqrt(sum(weight**2 for weight in each.values())) for each in (mine, theirs)]
            if all(norms):
                overlap /= norms[0] * norms[1]
            total += overlap * math.exp(-(gap**2) / (2 * 6.0**2)) / 4
    return 10 * total / len(references)


def weights(items, words, n):
    """How often each n-gram occurs, times the logarithm of how rare it is among the items' references."""
    found = {}
    for gram in ngrams(words, n):
        holding = sum(any(gram in ngrams(reference, n) for reference in references) for _, references in items)
        found[gram] = ngrams(words, n).count(gram) * (math.log(len(items)) - math.log(max(1, holding)))
    return found
