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
from pathlib import Path
from typing import Any

from mllm_keeplora.checks.run import Checked, check_run
from mllm_keeplora.errors import UserError, several
from mllm_keeplora.eval.results import Results
from mllm_keeplora.identity import Identity, other_pictures
from mllm_keeplora.report.compared import Choice, write_comparison
from mllm_keeplora.runs import RunDir
from mllm_keeplora.strategies import summary_of
from mllm_keeplora.sweeps.cells import Runner, log_of, visible_devices
from mllm_keeplora.sweeps.plan import (
    SweepConfig,
    Tuning,
    chosen_of,
    final_cell,
    final_cells,
    is_allowed,
    last_of,
    tune_cell,
)
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log


def run_sweep(sweep: SweepConfig, jobs: int | None = None) -> list[dict[str, Any]]:
    """Run every cell that is not finished, and write the comparison into the sweep's folder.

    Args:
        sweep: from `load_sweep`.
        jobs: runs side by side; each gets its share of the cores. None is one for each GPU, one where there is none.

    Returns:
        The results of the final runs, by strategy and seed.

    Raises:
        UserError: a final run, or every run of a strategy's tuning, failed; its log is named. The comparison of the
            others is written before; if there are none, nothing is.
    """
    check_sweep(sweep)
    runner = Runner(jobs, visible_devices())
    tunings = tune(sweep, runner)
    cells = final_cells(sweep, chosen_of(tunings))
    finals = runner.run(cells, "final")
    failed = [cell for cell, results in zip(cells, finals, strict=True) if results is None]
    missing = [nothing_of(sweep, label) for label, tuning in tunings.items() if tuning.best is None]
    missing += [f"{cell.folder.name} failed; see {log_of(cell.folder)}" for cell in failed]
    results_list = [results.to_dict() for results in finals if results is not None]
    if results_list:
        _report(sweep, tunings, results_list, missing)
    if missing:
        of_others = f"; the comparison of the others is in {sweep.folder}" if results_list else ""
        raise UserError(f"{'; '.join(missing)}{of_others}. The same command tries again what failed")
    return results_list


def tune(sweep: SweepConfig, runner: Runner) -> dict[str, Tuning]:
    """Try the grid for every strategy, and go on beyond it where the best lies at its edge.

    A strategy of which every run failed has no best value; the others are not held up.

    Raises:
        UserError: every run of every strategy failed; the logs are named.
    """
    tunings = {label: Tuning() for label in sweep.strategies}
    asked = [(label, value) for label in tunings for value in sweep.tune.grid]
    while asked:
        found = runner.run([tune_cell(sweep, *each) for each in asked], "tuning")
        for (label, value), results in zip(asked, found, strict=True):
            tunings[label].scores[value] = last_of(results)
        further = {label: tuning.next_value(sweep.tune) for label, tuning in tunings.items()}
        asked = [(label, value) for label, value in further.items() if value is not None]
        asked = [(label, value) for label, value in asked if is_allowed(tune_cell(sweep, label, value))]
    if not chosen_of(tunings):
        raise UserError(f"no run gave a result; see {sweep.folder}/tune/*.log")
    for label, tuning in tunings.items():
        if tuning.best is None:
            log.warning("%s", nothing_of(sweep, label))
        else:
            log.info("%s: chose %s %g", label, sweep.tune.key, tuning.best)
    return tunings


def check_sweep(sweep: SweepConfig) -> None:
    """Find the faults of data and every strategy's config before the first run, and finished runs of others.

    Raises:
        UserError: with all faults of configs at once, or with the first run of other data or base.
    """
    faults: list[str] = []
    looked_into: set[str] = set()  # splits: all runs read the same records, so one looks into them for all
    now: dict[str, tuple[Checked, Identity]] = {}  # by split
    for label in sweep.strategies:
        first = sweep.tune.grid[0]
        for cell in (tune_cell(sweep, label, first), final_cell(sweep, label, first, sweep.final.seeds[0])):
            config = cell.config()
            split = config.eval.split
            try:
                checked = check_run(config, look_inside=split not in looked_into)
            except UserError as error:
                faults.append(f"{label}: {error}")
            else:
                if split not in now:
                    identity = Identity.of_config(config, checked.benchmark, checked.base_fingerprint, checked.shown)
                    now[split] = checked, identity
            looked_into.add(split)
    if faults:
        raise several(list(dict.fromkeys(faults)))
    for path in sorted(sweep.folder.glob("*/*/results.json")):
        told = Results.load(path).identity
        if told.get("split") in now and _is_of_other_data(path.parent, told, *now[told["split"]]):
            raise UserError(
                f"{path.parent} was made with other data or another base than are here now; choose another `output`"
            )


def _is_of_other_data(folder: Path, told: Mapping[str, str | None], checked: Checked, wanted: Identity) -> bool:
    """Tell whether a finished run's results, or the pictures that it recorded, are not of the data or base of now."""
    now = {**wanted.told(), "base": checked.base_like(told.get("base"))}
    if any(value != told.get(key) for key, value in now.items() if key != "base" or value is not None):
        return True
    run = RunDir(folder)
    recorded = run.load().ledger.sets if run.exists() else {}
    return any(other_pictures(recorded[name], entry) for name, entry in wanted.sets.items() if name in recorded)


def _report(
    sweep: SweepConfig, tunings: Mapping[str, Tuning], results_list: list[dict[str, Any]], missing: Sequence[str]
) -> None:
    """Write the comparison of the final runs with how their settings were chosen, and the choice as JSON."""
    tried = [tune_cell(sweep, label, value).results() for label, tuning in tunings.items() for value in tuning.scores]
    choice = Choice(
        key=sweep.tune.key,
        values=chosen_of(tunings),
        tried=[results.to_dict() for results in tried if results is not None],
        table=_tuning_table(tunings),
        notes=[*_notes(sweep, tunings), *(f"Not in here: {each}." for each in missing)],
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
        texts = {value: "failed" if score is None else f"{score:.1f}" for value, score in tuning.scores.items()}
        if tuning.best is not None:
            texts[tuning.best] += " (chosen)"
        rows.append([label, *(texts.get(value, "") for value in values)])
    return ["", *(f"{value:g}" for value in values)], rows


def _notes(sweep: SweepConfig, tunings: Mapping[str, Tuning]) -> list[str]:
    tune, final = sweep.tune, sweep.final
    grid, seeds = ", ".join(f"{value:g}" for value in tune.grid), ", ".join(map(str, final.seeds))
    tuned = {label: tune_cell(sweep, label, tune.grid[0]).config() for label in tunings}
    some = next(iter(tuned))
    splits = tuned[some].eval.split, final_cell(sweep, some, tune.grid[0], final.seeds[0]).config().eval.split
    steps = "one step" if tune.extensions == 1 else f"{tune.extensions} steps"
    going_on = (
        f", and the grid goes on by the factor {tune.factor:g}, at most {steps} either way, while it lies at an edge"
    )
    notes = [f"{label}: {summary_of(config.strategy.name)}" for label, config in tuned.items()]
    notes.append(
        f"One rule for every strategy: {tune.key} from {grid} with seed {tune.seed}, graded on the {splits[0]} "
        f"questions; the highest Last is chosen{going_on if tune.extensions else ''}. "
        f"The chosen setting then runs with seeds {seeds}, graded on the {splits[1]} questions."
    )
    own = {
        label: [each for each in sweep.strategies[label] if not each.startswith("strategy.name=")] for label in tuned
    }
    told = [f"{label} has {', '.join(overrides)}" for label, overrides in own.items() if overrides]
    notes.append("Everything else is the same for all." if not told else f"Beyond that, {'; '.join(told)}.")
    edges = [label for label, tuning in tunings.items() if tuning.is_at_edge()]
    if edges:
        notes.append(f"Still at the edge of what was tried: {', '.join(edges)}.")
    return notes


def nothing_of(sweep: SweepConfig, label: str) -> str:
    """Say that a strategy has no setting to go on with."""
    return f"no setting of {label} gave a result; see {sweep.folder}/tune/{label}-*.log"
