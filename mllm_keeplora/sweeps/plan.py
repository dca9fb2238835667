"""What a sweep consists of: its YAML, the run of every value and seed, and which value is tried or chosen next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from mllm_keeplora.config import RUN_NAME, PathText, Section, apply_override, find_config, read_yaml
from mllm_keeplora.errors import UserError, several, validation_faults
from mllm_keeplora.eval.results import Results
from mllm_keeplora.sweeps.cells import Cell
from mllm_keeplora.system.log import log


class TuneConfig(Section):
    """Say how every strategy's setting is chosen."""

    key: str = "train.lr"
    grid: list[float] = Field(min_length=1)
    factor: float = Field(2.0, gt=1.0)
    extensions: int = Field(3, ge=0, description="at most so many more values beyond either end")
    seed: int = Field(0, ge=0)
    overrides: list[str] = Field(["eval.split=validation", "eval.domains=seen", "eval.zero_shot=false"])


class FinalConfig(Section):
    seeds: list[int] = Field(min_length=1)
    overrides: list[str] = Field([])


class SweepConfig(Section):
    """A sweep's YAML names a run to vary, strategies as lists of overrides, tuning and final runs."""

    name: str = Field(pattern=RUN_NAME)
    run: str
    strategies: dict[Annotated[str, Field(pattern=RUN_NAME)], list[str]] = Field(min_length=1)
    tune: TuneConfig
    final: FinalConfig
    output: PathText | None = None

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
    """Give the run that tries one value of the tuned key for one strategy."""
    folder = sweep.folder / "tune" / f"{label}-{value:g}"
    return _cell(sweep, label, value, sweep.tune.seed, sweep.tune.overrides, folder)


def final_cell(sweep: SweepConfig, label: str, value: float, seed: int) -> Cell:
    """Give the run of a strategy's chosen value with one seed; its folder names both: another choice is another run."""
    folder = sweep.folder / "final" / f"{label}-{value:g}-seed{seed}"
    return _cell(sweep, label, value, seed, sweep.final.overrides, folder)


def tune_cells(sweep: SweepConfig) -> list[Cell]:
    """List the runs of the stated grid; tuning may go on beyond it."""
    return [tune_cell(sweep, label, value) for label in sweep.strategies for value in sweep.tune.grid]


def final_cells(sweep: SweepConfig, chosen: Mapping[str, float]) -> list[Cell]:
    """List the runs of every strategy's chosen value, for every seed; a strategy without one is left out.

    Seed by seed: the first seed's comparison is whole early, and runs whose times are compared are near in time.
    """
    labels = [label for label in sweep.strategies if label in chosen]
    return [final_cell(sweep, label, chosen[label], seed) for seed in sweep.final.seeds for label in labels]


def _cell(sweep: SweepConfig, label: str, value: float, seed: int, extra: Sequence[str], folder: Path) -> Cell:
    own = [f"name={label}", f"seed={seed}", f"output={folder}", f"{sweep.tune.key}={value!r}"]
    shared = f"eval.base_answers={sweep.folder / 'base_answers'}"  # first, so that the sweep's YAML may say otherwise
    return Cell(sweep.run, (shared, *sweep.strategies[label], *extra, *own), folder)


@dataclass
class Tuning:
    """Keep what was tried for one strategy: value -> score, None if the run failed."""

    scores: dict[float, float | None] = field(default_factory=dict)

    @property
    def best(self) -> float | None:
        """The value with the highest score, the smaller one of equals; None if nothing was measured."""
        measured = {value: score for value, score in self.scores.items() if score is not None}
        return min(measured, key=lambda value: (-measured[value], value)) if measured else None

    def next_value(self, tune: TuneConfig) -> float | None:
        """Go one step beyond the edge that the best lies at; None if it lies inside or the grid may not grow."""
        best, low, high = self.best, min(self.scores), max(self.scores)
        reach = tune.factor ** (tune.extensions - 0.5)
        if best == low and low > min(tune.grid) / reach:
            value = low / tune.factor
        elif best == high and high < max(tune.grid) * reach:
            value = high * tune.factor
        else:
            return None
        value = float(f"{value:.6g}")  # 0.0005, not 0.0004999999
        return value if value not in self.scores else None

    def is_at_edge(self) -> bool:
        return len(self.scores) > 1 and self.best in (min(self.scores), max(self.scores))


def further_cell(sweep: SweepConfig, label: str) -> Cell | None:
    """Find the run of the next value beyond the grid, after what is done by now; None if the best lies inside."""
    tuning = Tuning({value: last_of(tune_cell(sweep, label, value).results()) for value in sweep.tune.grid})
    while (value := tuning.next_value(sweep.tune)) is not None:
        cell = tune_cell(sweep, label, value)
        if not is_allowed(cell):
            return None
        tuning.scores[value] = last_of(cell.results())
        if tuning.scores[value] is None:
            return cell
    return None


def chosen_of(tunings: Mapping[str, Tuning]) -> dict[str, float]:
    """Give the chosen value of every strategy that has one."""
    return {label: tuning.best for label, tuning in tunings.items() if tuning.best is not None}


def last_of(results: Results | None) -> float | None:
    return results.metrics["last"] if results is not None else None


def is_allowed(cell: Cell) -> bool:
    """Tell whether the config takes a value beyond the grid; the grid itself was checked at the start."""
    try:
        cell.config()
    except UserError as error:
        log.info("the grid ends here: %s", error)
        return False
    return True
