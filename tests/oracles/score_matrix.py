"""Continual-learning metrics by explicit loops over nested lists.

matrix[i][j] is the score on domain j after training domain i, both 0-based, T rows of T cells, no base row; None is a
cell that was not measured. A metric that needs a missing cell is None, and so is a mean over nothing (T = 1).
The argument `stage` of `ap` and `ft` is 1-based, as in AP_2.
"""


def mean(values):
    """Mean of a list, None if it is empty or holds None."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total / len(values) if values else None


def difference(left, right):
    """left - right, None if either is None."""
    return None if left is None or right is None else left - right


def largest(values):
    """Largest of a list, None if it is empty or holds None."""
    best = None
    for value in values:
        if value is None:
            return None
        if best is None or value > best:
            best = value
    return best


def last_per_domain(matrix):
    """A[T][j] for each j."""
    return list(matrix[-1])


def last(matrix):
    """Last: mean of the last row."""
    return mean(last_per_domain(matrix))


def average_per_domain(matrix):
    """Mean of A[i][j] over all stages i, cells before learning included, for each j."""
    T = len(matrix)
    return [mean([matrix[i][j] for i in range(T)]) for j in range(T)]


def average(matrix):
    """Average (KeepLoRA / MTIL): mean over domains of the column mean over all rows."""
    return mean(average_per_domain(matrix))


def transfer_per_domain(matrix):
    """Mean of A[i][j] over i < j for each j >= 1 (0-based), so T - 1 numbers."""
    return [mean([matrix[i][j] for i in range(j)]) for j in range(1, len(matrix))]


def transfer(matrix):
    """Transfer (KeepLoRA / MTIL): mean over later domains of their mean score before they were trained."""
    return mean(transfer_per_domain(matrix))


def mft(matrix):
    """MFT: mean of the diagonal A[j][j]."""
    return mean([matrix[j][j] for j in range(len(matrix))])


def mfn(matrix):
    """MFN: mean of A[T][j]; the same number as `last`."""
    T = len(matrix)
    return mean([matrix[T - 1][j] for j in range(T)])


def maa(matrix):
    """MAA: mean over stages i of the mean of A[i][1..i]."""
    stages = []
    for i in range(len(matrix)):
        stages.append(mean([matrix[i][j] for j in range(i + 1)]))
    return mean(stages)


def bwt(matrix):
    """BWT: mean over j < T of A[T][j] - A[j][j]."""
    T = len(matrix)
    return mean([difference(matrix[T - 1][j], matrix[j][j]) for j in range(T - 1)])


def ap(matrix, stage):
    """AP_t: mean over i <= t of A[t][i]."""
    return mean([matrix[stage - 1][i] for i in range(stage)])


def ft(matrix, stage, include_unseen=False):
    """FT_t: mean over i < t of (max over l < t of A[l][i]) - A[t][i].

    The maximum runs over stages at or after the domain's own, so the lower triangle is enough; with `include_unseen`
    it runs over all earlier stages, as the formula reads literally. Both agree unless a score was higher before.
    """
    t = stage - 1
    drops = []
    for i in range(t):
        first = 0 if include_unseen else i
        best = largest([matrix[row][i] for row in range(first, t)])
        drops.append(difference(best, matrix[t][i]))
    return mean(drops)


def forgetting(matrix, include_unseen=False):
    """Forgetting F: FT at the last stage, mean over j < T of the best earlier score minus A[T][j]."""
    return ft(matrix, len(matrix), include_unseen)


def fwt(matrix, base):
    """FWT (GEM): mean over j >= 2 of A[j-1][j] - A[0][j], with `base` the row A[0]."""
    return mean([difference(matrix[j - 1][j], base[j]) for j in range(1, len(matrix))])


def fwt_alone(matrix, alone):
    """FWT against single-domain training: mean over j of A[j][j] - R[j]."""
    return mean([difference(matrix[j][j], alone[j]) for j in range(len(matrix))])
