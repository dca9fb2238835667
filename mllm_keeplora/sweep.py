"""A sweep: the same rule for every strategy's setting, then the chosen settings over seeds, then a comparison.

    tune     every strategy over one stated grid with one seed, graded on the validation questions;
             the grid goes on by its factor while the best lies at its edge
    choose   the setting with the highest validation score; the smaller one of equals
    final    the chosen setting with every seed, graded on the test questions
    report   table, heat maps, trade-off curve

Every cell is a run of its own below the sweep's folder, so a sweep that was stopped continues where it was. It chooses
after whole rounds (the grid, then one value beyond for each strategy): the order in which runs end does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mllm_keeplora import files
from mllm_keeplora.cells import Cell, Runner, log_of, visible_devices
from mllm_keeplora.check import check_run
from mllm_keeplora.comparison import Choice, write_comparison
from mllm_keeplora.config import apply_override, find_config, read_yaml
from mllm_keeplora.errors import UserError, several, validation_faults
from mllm_keeplora.eval.results import Results, digest_of_data
from mllm_keeplora.log import log
from mllm_keeplora.opening import graded_parts
from mllm_keeplora.strategies import summary_of


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
    """The runs of every strategy's chosen value, for every seed."""
    return [final_cell(sweep, label, chosen[label], seed) for label in sweep.strategies for seed in sweep.final.seeds]


def _cell(sweep: SweepConfig, label: str, value: float, seed: int, extra: Sequence[str], folder: Path) -> Cell:
    own = [f"name={label}", f"seed={seed}", f"output={folder}", f"{sweep.tune.key}={value!r}"]
    return Cell(sweep.run, (*sweep.strategies[label], *extra, *own), folder)


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


def run_sweep(sweep: SweepConfig, jobs: int | None = None) -> list[dict[str, Any]]:
    """Run every cell that is not finished, and write the comparison into the sweep's folder.

    Args:
        sweep: from `load_sweep`.
        jobs: runs side by side; each gets its share of the cores. None is one for each GPU, one where there is none.

    Returns:
        The results of the final runs, by strategy and seed.

    Raises:
        UserError: a final run, or every run of a strategy's tuning, failed; its log is named.
    """
    check_sweep(sweep)
    runner = Runner(jobs, visible_devices())
    tunings = tune(sweep, runner)
    cells = final_cells(sweep, {label: tuning.best for label, tuning in tunings.items()})
    finals = runner.run(cells, "final")
    failed = [cell.folder for cell, results in zip(cells, finals, strict=True) if results is None]
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} final runs failed; see {log_of(failed[0])}")
    results_list = [results.to_dict() for results in finals]
    _report(sweep, tunings, results_list)
    return results_list


def tune(sweep: SweepConfig, runner: Runner) -> dict[str, Tuning]:
    """Try the grid for every strategy, and go on beyond it where the best lies at its edge.

    Raises:
        UserError: every run of a strategy failed; its logs are named.
    """
    tunings = {label: Tuning() for label in sweep.strategies}
    asked = [(label, value) for label in tunings for value in sweep.tune.grid]
    while asked:
        found = runner.run([tune_cell(sweep, *each) for each in asked], "tuning")
        for (label, value), results in zip(asked, found, strict=True):
            tunings[label].scores[value] = results.metrics["last"] if results is not None else None
        further = {label: tuning.next_value(sweep.tune) for label, tuning in tunings.items()}
        asked = [(label, value) for label, value in further.items() if value is not None]
        asked = [(label, value) for label, value in asked if _is_allowed(tune_cell(sweep, label, value))]
    for label, tuning in tunings.items():
        if tuning.best is None:
            raise UserError(f"no setting of {label} gave a result; see {sweep.folder}/tune/{label}-*.log")
        log.info("%s: chose %s %g", label, sweep.tune.key, tuning.best)
    return tunings


def check_sweep(sweep: SweepConfig) -> None:
    """Find the faults of every strategy's config before the first run, and finished runs of other data or base.

    Raises:
        UserError: with all faults of configs at once, or with the first run of other data or base.
    """
    faults: list[str] = []
    data: dict[str, tuple] = {}
    fingerprint = None
    for label in sweep.strategies:
        first = sweep.tune.grid[0]
        for cell in (tune_cell(sweep, label, first), final_cell(sweep, label, first, sweep.final.seeds[0])):
            try:
                checked = check_run(cell.config(), look_inside=False)
            except UserError as error:
                faults.append(f"{label}: {error}")
                continue
            benchmark, fingerprint = checked.benchmark, checked.base_fingerprint
            drawn = benchmark.root.name if benchmark.generator is not None else None
            data[benchmark.split] = (drawn, digest_of_data(graded_parts(benchmark)))
    if faults:
        raise several(list(dict.fromkeys(faults)))
    for path in sorted(sweep.folder.glob("*/*/results.json")):
        identity = Results.load(path).identity
        same_data = data.get(identity.get("split")) in (None, (identity.get("generator"), identity.get("data")))
        if not same_data or fingerprint not in (None, identity.get("base")):
            raise UserError(
                f"{path.parent} was made with other data or another base than are here now; choose another `output`"
            )


def _report(sweep: SweepConfig, tunings: Mapping[str, Tuning], results_list: list[dict[str, Any]]) -> None:
    """The comparison of the final runs with how their settings were chosen, and the choice as JSON."""
    tried = [tune_cell(sweep, label, value).results() for label, tuning in tunings.items() for value in tuning.scores]
    choice = Choice(
        key=sweep.tune.key,
        values={label: tuning.best for label, tuning in tunings.items()},
        tried=[results.to_dict() for results in tried if results is not None],
        table=_tuning_table(tunings),
        notes=_notes(sweep, tunings),
    )
    write_comparison(sweep.folder, sweep.name, results_list, choice)
    record = {
        label: {
            "chosen": tuning.best,
            "at_edge": tuning.is_at_edge(),
            "tried": {f"{value:g}": score for value, score in sorted(tuning.scores.items())},
        }
        for label, tuning in tunings.items()
    }
    files.write_text(sweep.folder / "sweep.json", json.dumps({"sweep": sweep.model_dump(), "tuning": record}, indent=1))


def _tuning_table(tunings: Mapping[str, Tuning]) -> tuple[list[str], list[list[str]]]:
    values = sorted({value for tuning in tunings.values() for value in tuning.scores})
    rows = []
    for label, tuning in tunings.items():
        cells = []
        for value in values:
            score = tuning.scores.get(value)
            text = "failed" if value in tuning.scores and score is None else "" if score is None else f"{score:.1f}"
            cells.append(f"{text} (chosen)" if value == tuning.best else text)
        rows.append([label, *cells])
    return ["", *(f"{value:g}" for value in values)], rows


def _notes(sweep: SweepConfig, tunings: Mapping[str, Tuning]) -> list[str]:
    tune, final = sweep.tune, sweep.final
    grid, seeds = ", ".join(f"{value:g}" for value in tune.grid), ", ".join(map(str, final.seeds))
    tuned = {label: tune_cell(sweep, label, tune.grid[0]).config() for label in tunings}
    some = next(iter(tuned))
    splits = tuned[some].eval.split, final_cell(sweep, some, tune.grid[0], final.seeds[0]).config().eval.split
    notes = [f"{label}: {summary_of(config.strategy.name)}" for label, config in tuned.items()]
    notes += [
        f"One rule for every strategy: {tune.key} from {grid} with seed {tune.seed}, graded on the {splits[0]} "
        f"questions; the highest Last is chosen, and the grid goes on by the factor {tune.factor:g} while the best "
        f"lies at its edge. The chosen setting then runs with seeds {seeds}, graded on the {splits[1]} questions."
    ]
    own = {
        label: [each for each in sweep.strategies[label] if not each.startswith("strategy.name=")] for label in tuned
    }
    told = [f"{label} has {', '.join(overrides)}" for label, overrides in own.items() if overrides]
    notes.append("Everything else is the same for all." if not told else f"Beyond that, {'; '.join(told)}.")
    edges = [label for label, tuning in tunings.items() if tuning.is_at_edge()]
    if edges:
        notes.append(f"Still at the edge of what was tried: {', '.join(edges)}.")
    return notes


def _is_allowed(cell: Cell) -> bool:
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
