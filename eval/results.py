"""The results of a run: the score matrix read from its predictions, the metrics, time and memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from mllm_keeplora.adapters.stored import stored_files
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark
from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.eval.grading import HowAsked, errors_of, stored_figures, stored_percent, stored_rows, strict_percent
from mllm_keeplora.eval.rows import blind_graded, by_type, collapses, sets_after
from mllm_keeplora.identity import Identity, environment, settings_of
from mllm_keeplora.metrics import ScoreMatrix, general_retention
from mllm_keeplora.runs import BASE_UNIT, RunDir, Unit
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log

FORMAT = 1


@dataclass
class Results:
    """The content of results.json; scores in percent, None where not measured.

    Attributes:
        per_type, blind_per_type: set -> question type -> score, after the last unit; where test records name types.
        errors: set -> form of error -> how many wrong answers of the last unit have it; see `metrics.mistake`.
        strict: set -> share of the last unit's answers that are the gold one word by word, in percent.
        grading: set -> how it was asked and graded: scorer, prompt suffix, picture mode, answer length, batch, dtype.
        alarms: sentences that tell which sets have collapsed between two rows; see `rows.collapses`.
        complete: every unit is learnt, and everything is measured that the config asks for.
        settings: every key that defines results, but name and seed, by dotted name; `parent` where there is one.
        identity: what was measured on: `split`, `data` (digest of its JSON files and grading rules), `generator` (of
            drawn data, with the hash of its code), `base` (fingerprint of the weights).
        origin: where the run keeps them: the file that `save` writes when it is given no other.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

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
    per_type: dict[str, dict[str, float]] = field(default_factory=dict)
    blind_per_type: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, int]] = field(default_factory=dict)
    strict: dict[str, float] = field(default_factory=dict)
    grading: dict[str, HowAsked] = field(default_factory=dict)
    trained_parameters: list[int] = field(default_factory=list)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    complete: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, str | None] = field(default_factory=dict)
    name: str = ""
    format: int = FORMAT
    origin: Path | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        left_out = {"origin"} if self.alarms else {"origin", "alarms"}  # results without any are as they always were
        return {key: value for key, value in asdict(self).items() if key not in left_out}

    def save(self, path: str | Path | None = None) -> None:
        """Write the results as JSON, by default to the run's own results.json.

        Raises:
            UserError: no path is given and the results belong to no run.
        """
        path = path or self.origin
        if path is None:
            raise UserError("results that belong to no run need a path to be saved to")
        files.write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results from a file; UserError where it is absent or of another format."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} does not exist: the run has no results yet")
        if (path.parent / "run.json").is_file():
            RunDir(path.parent).load()  # which knows the file's digest
        values = files.read_json(path, files.OBJECT)
        if values.get("format") != FORMAT:
            told = shortened(repr(values.get("format")))
            raise UserError(f"{path} has format {told}; this version reads {FORMAT}")
        results = files.read_json(path, cls)
        results.origin = path
        if misfit := results.misfit():
            raise UserError(f"{path} is damaged: {misfit}")
        return results

    def misfit(self) -> str:
        """Say which scores do not go with the domains; empty where all do."""
        count, matrix = len(self.domains), self.score_matrix
        series = {"zero_shot": self.zero_shot, "blind": self.blind}
        if not count or len(matrix) != count:
            return f"score_matrix has {len(matrix)} rows for {count} domains"
        for name, row in (*(("score_matrix", row) for row in matrix), *series.items()):
            if len(row) != count:
                return f"{name} has {len(row)} scores for {count} domains"
        for name, row in self.general.items():
            if not 1 <= len(row) <= count + 1:
                return f"general.{name} has {len(row)} scores for {count} domains"
        return ""


def collect_results(run: RunDir, benchmark: Benchmark, config: RunConfig) -> Results:
    """Read every cell from the predictions on disk.

    A union of domains is trained in one unit: it fills the last row of the matrix, since all domains are then seen.
    """
    ledger = run.ledger
    domains = [each["name"] for each in ledger.domains]
    suites = [each["name"] for each in ledger.suites]

    def scores(unit: Unit, names: list[str]) -> list[float | None]:
        folder = run.folder(unit)
        return [stored_percent(folder.predictions(name), benchmark.graded(name)) for name in names]

    matrix: list[list[float | None]] = [[None] * len(domains) for _ in domains]
    learnt, trained_rows = 0, {}
    for unit in run.units:
        learnt += len(unit.domains)
        matrix[learnt - 1] = trained_rows[unit.key] = scores(unit, domains)
    zero_shot = scores(BASE_UNIT, domains)
    units = [BASE_UNIT, *run.units]
    general = {suite: [percent for unit in units for percent in scores(unit, [suite])] for suite in suites}
    by_unit = {BASE_UNIT.key: zero_shot, **trained_rows}
    rows = {
        key: {**dict(zip(domains, row, strict=True)), **{suite: general[suite][number] for suite in suites}}
        for number, (key, row) in enumerate(by_unit.items())
    }
    metrics = dict(ScoreMatrix(matrix, zero_shot=zero_shot).metrics())
    metrics["general_retention"] = general_retention(general[suites[0]]) if suites else None

    # What the last unit answered, question by question.
    last: dict[str, list[dict[str, Any]]] = {}
    for name in [*domains, *suites] if run.finished_units else ():
        path = run.folder(run.finished_units[-1]).predictions(name)
        last[name] = stored_rows(path) if files.is_there(path) else []
    last = {name: rows for name, rows in last.items() if rows}
    typed = {name: by_type(benchmark, name, {row["id"]: row["score"] for row in rows}) for name, rows in last.items()}
    blind, blind_typed = _blind(run, benchmark, config, domains)

    asked = [(unit, name) for unit in units for name in sets_after(unit, run.units, benchmark, config)]
    is_graded = all(run.is_done(f"{unit.key}/evaluate/{name}") for unit, name in asked)
    trained = [ledger.stages[f"{unit.key}/train"].get("trained_parameters", 0) for unit in run.finished_units]
    needed = stored_files(run, run.finished_units)
    return Results(
        name=ledger.name,
        benchmark=ledger.benchmark,
        domains=domains,
        strategy=ledger.config["strategy.name"],
        base=ledger.base["name"],
        seed=ledger.config["seed"],
        score_matrix=matrix,
        zero_shot=zero_shot,
        blind=blind,
        general=general,
        metrics=metrics,
        wall_seconds=run.seconds_by_kind(),
        peak_memory_bytes=run.peak_memory_bytes(),
        questions={key.split("/")[-1]: each["questions"] for key, each in ledger.stages.items() if "questions" in each},
        environment=environment(),
        per_type={name: kinds for name, kinds in typed.items() if kinds},
        blind_per_type={name: blind_typed[name] for name in domains if blind_typed.get(name)},
        errors={name: found for name, rows in last.items() if (found := errors_of(rows, benchmark.graded(name)))},
        strict={name: percent for name, rows in last.items() if (percent := strict_percent(rows)) is not None},
        grading={name: _grading(benchmark, run, name) for name in [*domains, *suites]},
        trained_parameters=trained,
        stored_bytes={use: sum(path.stat().st_size for path in paths) for use, paths in needed.items()},
        alarms=collapses(rows, config.eval.collapse_alarm),
        complete=is_graded and len(run.finished_units) == len(run.units),
        settings=settings_of(ledger),
        identity=Identity.of_ledger(ledger).told(),
        origin=run.results_file,
    )


def _blind(
    run: RunDir, benchmark: Benchmark, config: RunConfig, domains: list[str]
) -> tuple[list[float | None], dict[str, dict[str, float]]]:
    """Grade blind answers, also by question type; scores stay as they were where training records are gone."""
    try:
        before = files.read_json(run.results_file, files.OBJECT) if run.results_file.is_file() else {}
    except UserError as error:  # it is made again here
        log.warning("%s", error)
        before = {}
    percents = dict(zip(before.get("domains", ()), before.get("blind", ()), strict=False))
    typed = dict(before.get("blind_per_type", {}))
    for name in filter(benchmark.has_training, domains):
        scores, percents[name] = blind_graded(benchmark, name, config)
        typed[name] = by_type(benchmark, name, scores)
    return [percents.get(name) for name in domains], typed


def _grading(benchmark: Benchmark, run: RunDir, name: str) -> dict[str, Any]:
    """Tell how a set was asked after the last unit that it was asked after, and how it is graded."""
    part = benchmark.graded(name)
    told = {key: getattr(part, key) for key in ("scorer", "prompt_suffix", "image_mode", "max_new_tokens")}
    for unit in [*reversed(run.finished_units), BASE_UNIT]:
        figures = stored_figures(run.folder(unit).predictions(name))
        if figures:
            return {**told, **{key: value for key, value in figures.items() if key != "percent" and value != {}}}
    return told
