"""Metrics of continual learning, all derived from one matrix of scores.

Below, A[i][j] is the score on domain j after training domain i, i and j counted from 1 to T; A[0] is the base model.
A cell that was not measured stays empty: a metric that needs it is None, never a number made from zeros.
"""

from collections.abc import Sequence

import numpy as np

Score = float | None


class ScoreMatrix:
    """Hold the scores of every domain after every domain of a sequence, in percent."""

    def __init__(
        self,
        rows: Sequence[Sequence[Score]],
        zero_shot: Sequence[Score] | None = None,
        alone: Sequence[Score] | None = None,
    ) -> None:
        """Check and keep the scores.

        Args:
            rows: (T, T) percent; row i is measured after training domain i. None or NaN = not measured.
            zero_shot: (T,) scores of the base model.
            alone: (T,) scores of models trained on one domain each.

        Raises:
            ValueError: `rows` is not square, a vector has another length, or a score is infinite.
        """
        self.rows = _as_scores("rows", rows)
        if self.rows.ndim != 2 or self.rows.shape[0] != self.rows.shape[1] or not self.rows.size:
            raise ValueError(f"rows must be (T, T), one row and one column per domain, got shape {self.rows.shape}")
        self.num_domains = len(self.rows)
        self.zero_shot = self._per_domain("zero_shot", zero_shot)
        self.alone = self._per_domain("alone", alone)

    def after(self, num_domains: int) -> "ScoreMatrix":
        """Return the matrix of the sequence cut after its first domains: how the run stood at that moment."""
        if not 1 <= num_domains <= self.num_domains:
            raise ValueError(f"num_domains must be in 1..{self.num_domains}, got {num_domains}")
        t = num_domains
        return ScoreMatrix(self.rows[:t, :t], self.zero_shot[:t], self.alone[:t])

    def metrics(self) -> dict[str, Score]:
        """Compute every metric of the literature, in percent.

        Returns:
            last, mfn, ap: mean of A[T] (three names in use for one number).
            average: mean of all cells, those before learning included (KeepLoRA, MTIL; no base row).
            transfer: for each j >= 2 the mean of A[i][j] over i < j, then the mean over j (KeepLoRA, MTIL).
            mft, plasticity: mean of A[j][j], the score right after learning.
            maa: mean over i of the mean of A[i][1..i].
            bwt: mean over j < T of A[T][j] - A[j][j].
            forgetting, ft: mean over j < T of (max over j <= i < T of A[i][j]) - A[T][j] (Chaudhry et al.; GainLoRA).
                Scores from before a domain was learned do not enter, although the papers' index would let them: a run
                would get another number only for having measured more.
            fwt: mean over j >= 2 of A[j-1][j] - A[0][j] (GEM).
            fwt_alone: mean over j of A[j][j] - alone[j] (SAPT).
            None where a cell it needs was not measured, or where T = 1 leaves nothing to average. The lower triangle is
            enough for all but average, transfer and fwt.
        """
        final, learned = self.rows[-1], np.diag(self.rows)
        before = [self.rows[:j, j].mean() for j in range(1, self.num_domains)]
        # np.max hands on the NaN of a cell that was not measured.
        lost = [self.rows[j:-1, j].max() - final[j] for j in range(self.num_domains - 1)]
        last, plasticity, forgetting = _mean(final), _mean(learned), _mean(lost)
        return {
            "last": last,
            "average": _mean(self.rows),
            "transfer": _mean(before),
            "mft": plasticity,
            "mfn": last,
            "maa": _mean([row[: i + 1].mean() for i, row in enumerate(self.rows)]),
            "bwt": _mean(final[:-1] - learned[:-1]),
            "forgetting": forgetting,
            "plasticity": plasticity,
            "ap": last,
            "ft": forgetting,
            "fwt": _mean(np.diag(self.rows, k=1) - self.zero_shot[1:]),
            "fwt_alone": _mean(learned - self.alone),
        }

    def _per_domain(self, name: str, scores: Sequence[Score] | None) -> np.ndarray:
        if scores is None:
            return np.full(self.num_domains, np.nan)
        vector = _as_scores(name, scores)
        if vector.shape != (self.num_domains,):
            raise ValueError(f"{name} must hold one score per domain ({self.num_domains}), got shape {vector.shape}")
        return vector


def general_retention(series: Sequence[Score]) -> Score:
    """Return which share of a general ability is left: final score / initial score.

    Args:
        series: scores before the first domain and after each domain.

    Returns:
        The ratio (1 = all kept); None if either end was not measured, nothing was trained, or it started at 0.
    """
    scores = _as_scores("series", series)
    if len(scores) < 2 or np.isnan(scores[[0, -1]]).any() or scores[0] == 0:
        return None
    return float(scores[-1] / scores[0])


def _as_scores(name: str, values: Sequence) -> np.ndarray:
    try:
        scores = np.array(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers or None in a regular grid, got {values!r}") from error
    if np.isinf(scores).any():
        raise ValueError(f"{name} must hold finite scores or None, got {values!r}")
    return scores


def _mean(values: np.ndarray | Sequence[float]) -> Score:
    """Return the mean, or None if there is nothing to average or a value was not measured."""
    if not len(values) or np.isnan(values).any():
        return None
    return float(np.mean(values))
