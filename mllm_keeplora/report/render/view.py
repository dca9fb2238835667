"""What every rendering shows alike: rows and columns of the score sheet, names of metrics, how numbers are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]  # the content of results.json
Score = float | None
NOT_MEASURED = "–"
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Metric:
    """Describe a metric of results["metrics"] as a reader meets it."""

    key: str
    label: str
    meaning: str
    higher_is_better: bool = True
    signed: bool = False


METRICS = (
    Metric("last", "Last", "mean score after the whole sequence"),
    Metric("average", "Average", "mean of all cells, domains not yet learned included"),
    Metric("transfer", "Transfer", "how a domain scores before it is learned, mean over domains from the second on"),
    Metric("plasticity", "Plasticity", "mean score right after learning"),
    Metric("bwt", "BWT", "mean change since right after learning", signed=True),
    Metric("forgetting", "Forgetting", "mean loss against the best earlier score", higher_is_better=False),
    Metric("general_retention", "General kept", "share of the general score that is left"),
)


@dataclass(frozen=True)
class Row:
    """Hold a line of the score sheet: `stage` is the index of the domain just trained, None for a reference row.

    `is_union`: all domains were trained at once.
    """

    label: str
    scores: tuple[Score, ...]
    stage: int | None = None
    is_union: bool = False

    @property
    def is_measured(self) -> bool:
        return _is_any(self.scores)

    def phase(self, column: int, num_domains: int) -> str:
        """Say what the cell is: "reference", "general", or a domain "learned" right now, "seen" or "unseen"."""
        if self.stage is None:
            return "reference"
        if column >= num_domains:
            return "general"
        return "learned" if column == self.stage or self.is_union else "seen" if column < self.stage else "unseen"


@dataclass(frozen=True)
class Sheet:
    """Lay the score matrix out, reference rows on top, the general suites as further columns."""

    domains: tuple[str, ...]
    suites: tuple[str, ...]
    references: tuple[Row, ...]
    stages: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.domains + self.suites

    @property
    def measured(self) -> tuple[Row, ...]:
        """The references and stages that hold a score."""
        return self.references + tuple(row for row in self.stages if row.is_measured)


def score_sheet(results: Results) -> Sheet:
    """Lay out a results dict; a cell that was not measured is None, and a reference row without a score is left out.

    Raises:
        ValueError: the matrix, a reference row or a general series does not fit the number of domains.
    """
    domains, suites = tuple(results["domains"]), results.get("general") or {}
    num_domains = len(domains)
    matrix = [_fit("score_matrix row", row, num_domains) for row in results["score_matrix"]]
    if len(matrix) != num_domains:
        raise ValueError(f"score_matrix must have one row per domain ({num_domains}), got {len(matrix)}")
    general = [_general_series(name, series, matrix) for name, series in suites.items()]
    zero_shot = _fit("zero_shot", results.get("zero_shot") or (), num_domains)
    blind = _fit("blind", results.get("blind") or (), num_domains)
    references = (
        Row(ZERO_SHOT, zero_shot + tuple(series[0] for series in general)),
        Row("blind", blind + (None,) * len(general)),
    )
    # A strategy that learns all domains at once measures its last row only: that row is not "after" one domain.
    is_joint = num_domains > 1 and not any(map(_is_any, matrix[:-1])) and _is_any(matrix[-1])
    stages = []
    for i, domain in enumerate(domains):
        is_union = is_joint and i == num_domains - 1
        scores = matrix[i] + tuple(series[i + 1] for series in general)
        stages.append(Row("after all" if is_union else f"after {domain}", scores, i, is_union))
    return Sheet(domains, tuple(suites), tuple(row for row in references if row.is_measured), tuple(stages))


def run_title(results: Results) -> str:
    """Name a run: its own name where it has one, else its strategy."""
    return str(results.get("name") or results["strategy"])


def score_text(value: Score, signed: bool = False) -> str:
    """Write a score or a difference of scores in percent with one decimal."""
    if value is None:
        return NOT_MEASURED
    return f"{value:+.1f}" if signed else f"{value:.1f}"


def metric_text(metric: Metric, value: Score) -> str:
    """Write a metric's value; retention is a ratio and is shown in percent."""
    if metric.key == "general_retention" and value is not None:
        return f"{100 * value:.1f} %"
    return score_text(value, metric.signed)


def duration_text(seconds: float) -> str:
    """Write a duration: 0.4 s, 48 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def memory_text(num_bytes: float) -> str:
    """Write an amount of memory in MiB or GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _general_series(name: str, series: Sequence[Score], matrix: Sequence[Sequence[Score]]) -> tuple[Score, ...]:
    """Line a general series up with the rows: it has one score per training, and a training may learn many domains."""
    measured = [i for i, row in enumerate(matrix) if _is_any(row)]
    padded = _fit(f"general series {name!r}", series, len(matrix) + 1)
    if len(series) != len(measured) + 1:
        return padded
    after = dict(zip(measured, padded[1:], strict=False))
    return (padded[0], *(after.get(i) for i in range(len(matrix))))


def _fit(name: str, values: Sequence[Score], length: int) -> tuple[Score, ...]:
    """Pad a series that stops early (a run in progress) with cells that were not measured."""
    if len(values) > length:
        raise ValueError(f"{name} holds {len(values)} scores, at most {length} fit the domains")
    scores = tuple(None if value is None or value != value else float(value) for value in values)
    return scores + (None,) * (length - len(scores))


def _is_any(scores: Sequence[Score]) -> bool:
    return any(score is not None for score in scores)
