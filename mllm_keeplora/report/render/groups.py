"""Runs put together for comparison: the seeds of one setting are a group with a mean and a spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.report.render.view import Metric, Results, Score, metric_text, run_title

REFERENCE, UPPER = "finetune", "joint"  # strategies that others are measured against where they are there
GRADING = ("eval.limit", "eval.suite_limit", "eval.max_new_tokens")


@dataclass(frozen=True)
class Group:
    """A group holds runs that differ by seed alone.

    Attributes:
        label: what a reader knows it by; unique within a comparison.
        family: label without the settings that tell groups of one name apart: the name that its runs share, or the
            strategy where they share none or share it with another strategy.
        setting: those settings, e.g. "lr 0.002"; empty if the family has one group.
        runs: results by ascending seed.
    """

    label: str
    family: str
    setting: str
    runs: tuple[Results, ...]

    @property
    def strategy(self) -> str:
        return self.runs[0]["strategy"]

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in self.runs]

    def metric(self, key: str) -> list[Score]:
        """List the values of a metric by ascending seed."""
        return [run["metrics"].get(key) for run in self.runs]

    def finals(self, domain: str) -> list[Score]:
        """List the scores on a domain after the whole sequence, by ascending seed."""
        return [run["score_matrix"][-1][run["domains"].index(domain)] for run in self.runs]


def group_runs(results_list: Sequence[Results]) -> list[Group]:
    """Put the seeds of one setting together, groups in the order of their first run.

    Results that tell no settings are known by their name.

    Raises:
        UserError: no run; runs of other domains, data, base or split; the same setting and seed twice.
    """
    if not results_list:
        raise UserError("nothing to compare: no results given")
    _refuse_strangers(results_list)
    by_setting: dict[str, list[Results]] = {}
    strategies: dict[str, set[str]] = {}
    for results in results_list:
        settings = sorted((results.get("settings") or {}).items()) or run_title(results)
        by_setting.setdefault(repr((results["strategy"], results["domains"], settings)), []).append(results)
        strategies.setdefault(run_title(results), set()).add(results["strategy"])
    groups = []
    for runs in by_setting.values():
        runs = sorted(runs, key=lambda run: run["seed"])
        names = {run_title(run) for run in runs}
        is_own = len(names) == 1 and len(strategies[min(names)]) == 1
        family = min(names) if is_own else runs[0]["strategy"]
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{family}: the same settings and seed were given twice (seeds {seeds})")
        if len({repr({name: len(row) for name, row in (run.get("general") or {}).items()}) for run in runs}) > 1:
            raise UserError(f"{family}: its seeds were graded on other suites, or not equally often")
        groups.append(Group(family, family, "", tuple(runs)))
    return [_told_apart(group, [each.runs[0] for each in groups if each.family == group.family]) for group in groups]


def mean_and_sd(values: Sequence[Score]) -> tuple[Score, Score]:
    """Give mean and sample standard deviation; None if a value was not measured, or one value has no spread."""
    if not values or any(value is None for value in values):
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_text(metric: Metric, values: Sequence[Score], joint: str = " ") -> str:
    """Write `mean ± sd` as the metric is written, or the mean alone."""
    mean, sd = mean_and_sd(values)
    if sd is None:
        return metric_text(metric, mean)
    unsigned = replace(metric, signed=False)
    return f"{metric_text(metric, mean)}{joint}±{metric_text(unsigned, sd).removesuffix(' %')}"


def paired_differences(group: Group, reference: Group, key: str) -> dict[int, float]:
    """Subtract the reference's metric from the group's, seed by seed where both measured it."""
    ours, theirs = (dict(zip(each.seeds, each.metric(key), strict=True)) for each in (group, reference))
    both = [seed for seed in ours if ours[seed] is not None and theirs.get(seed) is not None]
    return {seed: ours[seed] - theirs[seed] for seed in both}


def find_group(groups: Sequence[Group], strategy: str) -> Group | None:
    """Find the only group of a strategy, or of several the only one that has its name."""
    found = [group for group in groups if group.strategy == strategy]
    found = found if len(found) == 1 else [group for group in found if group.family == strategy]
    return found[0] if len(found) == 1 else None


def shares_of_upper(group: Group, upper: Group | None) -> list[Score]:
    """Give Last as a share of joint training's mean Last, by seed; empty without joint training."""
    top = mean_and_sd(upper.metric("last"))[0] if upper is not None else None
    return [] if not top else [None if last is None else last / top for last in group.metric("last")]


def mean_results(group: Group) -> Results:
    """Make a results dict whose cells are means over the group's seeds; NaN where any seed did not measure."""
    import numpy as np

    def mean(of: Callable[[Results], Any]) -> list:
        return np.mean([np.array(of(run), dtype=float) for run in group.runs], axis=0).tolist()

    first = group.runs[0]
    general = {name: mean(lambda run, name=name: run["general"][name]) for name in first.get("general") or {}}
    means = {key: mean(lambda run, key=key: run[key]) for key in ("score_matrix", "zero_shot")}
    return {**first, "name": group.label, "general": general, **means}


def split_of(groups: Sequence[Group]) -> str:
    """Tell which questions the groups were graded on: test or validation."""
    return (groups[0].runs[0].get("identity") or {}).get("split") or "test"


def trade_off_curves(groups: Sequence[Group]) -> dict[str, list[tuple[str, float, float]]]:
    """Give each family its (setting, mean plasticity, mean BWT) by setting; without those that lack either."""
    curves: dict[str, list[tuple[str, float, float]]] = {}
    for group in groups:
        plasticity, bwt = mean_and_sd(group.metric("plasticity"))[0], mean_and_sd(group.metric("bwt"))[0]
        if plasticity is not None and bwt is not None:
            curves.setdefault(group.family, []).append((group.setting, plasticity, bwt))
    return {family: sorted(points, key=_number_first) for family, points in curves.items()}


def _refuse_strangers(results_list: Sequence[Results]) -> None:
    first, one = results_list[0], _place(results_list[0], 1)
    for number, results in enumerate(results_list[1:], start=2):
        other = _place(results, number)
        if sorted(results["domains"]) != sorted(first["domains"]):
            raise UserError(f"{other} learned {results['domains']}, {one} {first['domains']}")
        ours, theirs = results.get("identity") or {}, first.get("identity") or {}
        if bool(ours) != bool(theirs):
            raise UserError(
                f"{other if theirs else one} does not tell what it was measured on; let this version write its results "
                "again (mllm-keeplora report RUN)"
            )
        limits = [[(each.get("settings") or {}).get(key) for key in GRADING] for each in (results, first)]
        told = [f"{key} is {mine} and {his}" for key, mine, his in zip(GRADING, *limits, strict=True) if mine != his]
        told += [
            f"their {key} differs ({ours.get(key)} and {theirs.get(key)})"
            for key in ("split", "generator", "data", "base")
            if ours.get(key) != theirs.get(key)
        ]
        if told:
            raise UserError(f"{other} and {one} cannot be compared: {told[0]}")


def _place(results: Results, number: int) -> str:
    """Which run is meant: several may have one name."""
    return f"{run_title(results)} (number {number}: {results['strategy']}, seed {results['seed']})"


def _told_apart(group: Group, namesakes: Sequence[Results]) -> Group:
    """Add the settings that differ among first runs of one name to the group's label, and the order of domains."""
    tables = [{**(run.get("settings") or {}), "order": "-".join(run["domains"])} for run in namesakes]
    own = tables[namesakes.index(group.runs[0])]
    keys = [*dict.fromkeys(key for table in tables for key in table if key != "order"), "order"]
    differing = [key for key in keys if len({repr(table.get(key)) for table in tables}) > 1]
    if not differing:
        return group
    setting = ", ".join(f"{key.split('.')[-1]} {own.get(key)}" for key in differing)
    return replace(group, label=f"{group.family}, {setting}", setting=setting)


def _number_first(point: tuple[str, float, float]) -> tuple[float, str]:
    """Settings that end in a number sort by it."""
    setting = point[0]
    try:
        return float(setting.rpartition(" ")[2]), setting
    except ValueError:
        return float("inf"), setting
