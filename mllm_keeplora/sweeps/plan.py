"""What a sweep consists of: its YAML, the run of every value and seed, and which value is tried or chosen next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mllm_keeplora.config import apply_override, find_config, read_yaml
from mllm_keeplora.errors import UserError, several, validation_faults
from mllm_keeplora.eval.results import Results
from mllm_keeplora.sweeps.cells import Cell
from mllm_keeplora.system.log import log


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TuneConfig(Section):
    """How every strategy's setting is chosen."""

    key: str = "train.lr"
    grid: list[float] = Field(min_length=1)
    factor: float = Field(2.0, gt=1.0)
    extensions: int = Field(3, ge=0, description="at most so many more values beyond either end")
    seed: int = Field(0, ge=0)
    overrides: list[str] = ["eval.split=validation", "eval.domains=seen", "eval.zero_shot=false"]


class FinalConfig(Section):
    seeds: list[int] = Field(min_length=1)
    overrides: list[str] = []


class SweepConfig(Section):
    """A sweep's YAML: a run that every cell varies, strategies as lists of overrides, tuning and final runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run: str
    strategies: dict[str, list[str]] = Field(min_length=1)
    tune: TuneConfig
    final: FinalConfig
    output: str | None = None

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/sweeps/{self.name}")


def load_sweep(source: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep's YAML (a path, or a shipped name) and lay dotted overrides over it.

    Raises:
        UserError: the file, a key of it, or a cell's run config has a fault; all of one kind at once.
    """
    path = find_config("sweeps", source)
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    try:
        sweep = SweepConfig.model_validate(values)
    except ValidationError as error:
        raise several(validation_faults(error, str(source), SweepConfig)) from None
    if len(set(sweep.tune.grid)) < len(sweep.tune.grid) or len(set(sweep.final.seeds)) < len(sweep.final.seeds):
        raise UserError(f"tune.grid and final.seeds must not name a value twice ({source})")
    seen: dict[str, str] = {}
    for label in sweep.strategies:
        for value in sweep.tune.grid:
            cell = tune_cell(sweep, label, value).config()
        final_cell(sweep, label, sweep.tune.grid[0], sweep.final.seeds[0]).config()
        settings = repr({key: value for key, value in cell.result_defining().items() if key != "name"})
        if settings in seen:
            raise UserError(f"strategies {seen[settings]} and {label} have the same settings ({source})")
        seen[settings] = label
    return sweep


def tune_cell(sweep: SweepConfig, label: str, value: float) -> Cell:
    """The run that tries one value of the tuned key for one strategy."""
    folder = sweep.folder / "tune" / f"{label}-{value:g}"
    return _cell(sweep, label, value, sweep.tune.seed, sweep.tune.overrides, folder)


def final_cell(sweep: SweepConfig, label: str, value: float, seed: int) -> Cell:
    """The run of one strategy's chosen value with one seed; its folder names both, so another choice is another run."""
    folder = sweep.folder / "final" / f"{label}-{value:g}-seed{seed}"
    return _cell(sweep, label, value, seed, sweep.final.overrides, folder)


def tune_cells(sweep: SweepConfig) -> list[Cell]:
    """The runs of the stated grid; tuning may go on beyond it."""
    return [tune_cell(sweep, label, value) for label in sweep.strategies for value in sweep.tune.grid]


def final_cells(sweep: SweepConfig, chosen: Mapping[str, float]) -> list[Cell]:
    """The runs of every strategy's chosen value, for every seed; of those that have one.

    Seed by seed: one seed's comparison is whole after the first of them, and runs whose times are compared are near in
    time.
    """
    labels = [label for label in sweep.strategies if label in chosen]
    return [final_cell(sweep, label, chosen[label], seed) for seed in sweep.final.seeds for label in labels]


def _cell(sweep: SweepConfig, label: str, value: float, seed: int, extra: Sequence[str], folder: Path) -> Cell:
    own = [f"name={label}", f"seed={seed}", f"output={folder}", f"{sweep.tune.key}={value!r}"]
    shared = f"eval.base_answers={sweep.folder / 'base_answers'}"  # first, so that the sweep's YAML may say otherwise
    return Cell(sweep.run, (shared, *sweep.strategies[label], *extra, *own), folder)


@dataclass
class Tuning:
    """What was tried for one strategy: value -> score; None where the run failed."""

    scores: dict[float, float | None] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """The value with the highest score, the smaller one of equals; None where nothing was measured."""
        measured = {value: score for value, score in self.scores.items() if score is not None}
        return min(measured, key=lambda value: (-measured[value], value)) if measured else None

    def next_value(self, tune: TuneConfig) -> float | None:
        """One step beyond the edge that the best lies at; None where it lies inside or the grid may not grow."""
        best, low, high = self.best, min(self.scores), max(self.scores)
        value = None
        if best == low and low > min(tune.grid) / tune.factor ** (tune.extensions - 0.5):
            value = _rounded(low / tune.factor)
        elif best == high and high < max(tune.grid) * tune.factor ** (tune.extensions - 0.5):
            value = _rounded(high * tune.factor)
        return value if value not in self.scores else None

    def is_at_edge(self) -> bool:
        return len(self.scores) > 1 and self.best in (min(self.scores), max(self.scores))


def further_cell(sweep: SweepConfig, label: str) -> Cell | None:
    """The run of the next value beyond the grid, after what is done by now; None where the best lies inside."""
    tuning, cell = Tuning({value: last_of(tune_cell(sweep, label, value).results()) for value in sweep.tune.grid}), None
    while (value := tuning.next_value(sweep.tune)) is not None and cell is None:
        further = tune_cell(sweep, label, value)
        if not is_allowed(further):
            break
        tuning.scores[value] = last_of(further.results())
        cell = further if tuning.scores[value] is None else None
    return cell


def chosen_of(tunings: Mapping[str, Tuning]) -> dict[str, float]:
    """The chosen value of every strategy that has one."""
    return {label: tuning.best for label, tuning in tunings.items() if tuning.best is not None}


def last_of(results: Results | None) -> float | None:
    return results.metrics["last"] if results is not None else None


def is_allowed(cell: Cell) -> bool:
    """Whether a value beyond the grid is one that the config takes; the grid itself was checked at the start."""
    try:
        cell.config()
    except UserError as error:
        log.info("the grid ends here: %s", error)
        return False
    return True


def _rounded(value: float) -> float:
    """Six significant digits: 0.0005, not 0.0004999999."""
    return float(f"{value:.6g}")
