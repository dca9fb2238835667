"""The results of a run: the score matrix read from its predictions, the metrics, time and memory."""

from __future__ import annotations

import platform
from dataclasses import InitVar, asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from mllm_keeplora import files
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.rows import stored_score
from mllm_keeplora.metrics import ScoreMatrix, general_retention
from mllm_keeplora.runs import BASE_UNIT, RunDir

FORMAT = 1
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "pillow", "torchvision")


@dataclass
class Results:
    """Content of results.json; scores in percent, None where not measured.

    `origin` is where the run keeps them: the file that `save` writes when it is given no other.
    """

    benchmark: str
    domains: list[str]
    strategy: str
    base: str
    seed: int
    score_matrix: list[list[float | None]]
    zero_shot: list[float | None]
    blind: list[float | None]
    general: dict[str, list[float | None]]
    metrics: dict[str, float | None]
    wall_seconds: dict[str, float]
    peak_memory_bytes: int
    questions: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    name: str = ""
    format: int = FORMAT
    origin: InitVar[Path | None] = None

    def __post_init__(self, origin: Path | None):
        self._origin = origin

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path | None = None) -> None:
        """Write the results as JSON, by default to the run's own results.json.

        Raises:
            UserError: no path is given and the results belong to no run.
        """
        path = path or self._origin
        if path is None:
            raise UserError("results that belong to no run need a path to be saved to")
        files.write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Raises UserError where the file is absent or of another format."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist: the run has no results yet")
        values = files.read_json(path)
        if values.get("format") != FORMAT:
            raise UserError(f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
        return cls(**values, origin=path)


def collect_results(run: RunDir, blind: list[float | None]) -> Results:
    """Read every cell from the predictions on disk.

    A union of domains is trained in one unit: it fills the last row of the matrix, since all domains are then seen.
    """
    domains = [each["name"] for each in run.record["domains"]]
    suites = [each["name"] for each in run.record["suites"]]
    base_folder = run.folder(BASE_UNIT)
    matrix: list[list[float | None]] = [[None] * len(domains) for _ in domains]
    general: dict[str, list[float | None]] = {suite: [stored_score(base_folder, suite)] for suite in suites}
    learnt = 0
    for unit in run.units:
        learnt += len(unit.domains)
        matrix[learnt - 1] = [stored_score(run.folder(unit), name) for name in domains]
        for suite in suites:
            general[suite].append(stored_score(run.folder(unit), suite))
    zero_shot = [stored_score(base_folder, name) for name in domains]
    metrics = dict(ScoreMatrix(matrix, zero_shot=zero_shot).metrics())
    metrics["general_retention"] = general_retention(general[suites[0]]) if suites else None
    record = run.record
    return Results(
        name=record["name"],
        benchmark=record["benchmark"],
        domains=domains,
        strategy=record["config"]["strategy.name"],
        base=record["base"]["name"],
        seed=record["config"]["seed"],
        score_matrix=matrix,
        zero_shot=zero_shot,
        blind=blind,
        general=general,
        metrics=metrics,
        wall_seconds=run.seconds_by_kind(),
        peak_memory_bytes=run.peak_memory_bytes(),
        questions=_counts(run),
        environment=environment(),
        origin=run.results,
    )


def environment() -> dict[str, str]:
    """Versions that can move a number."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "mllm_keeplora": _version("mllm-keeplora"),
    }
    return found | {name: version for name in LIBRARIES if (version := _version(name))}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _counts(run: RunDir) -> dict[str, int]:
    return {
        stage.split("/")[2]: entry["questions"] for stage, entry in run.record["stages"].items() if "questions" in entry
    }
