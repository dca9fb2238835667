"""What strategies cost beside the reference: parameters that train, bytes that stay, time. Pure of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mllm_keeplora.report.render.export import Table
from mllm_keeplora.report.render.groups import REFERENCE, Group, find_group, mean_and_sd
from mllm_keeplora.report.render.view import NOT_MEASURED

HEADS = ["", "trained parameters", "stored to answer", "stored to go on", "training time", "answering time"]


def costs(groups: Sequence[Group]) -> Table | None:
    """A row per group: means over seeds; times, medians, relative to sequential LoRA. None where nothing is recorded.

    Trained parameters are the most of any domain. Stored is what the state after the last domain needs: to answer,
    and besides that to learn a further domain.
    """
    if not all(run.get("stored_bytes") and run.get("trained_parameters") for group in groups for run in group.runs):
        return None
    reference = find_group(groups, REFERENCE)
    rows = []
    for group in groups:
        stored = [_mean(group, lambda run, key=key: run["stored_bytes"][key]) for key in ("answering", "learning")]
        trained = max(max(run["trained_parameters"]) for run in group.runs)
        times = [_ratio(group, reference, stage) for stage in ("train", "evaluate")]
        rows.append([group.label, f"{trained:,}", *(f"{each / 1e6:.2f} MB" for each in stored), *times])
    return list(HEADS), rows


def _mean(group: Group, of: Any) -> float:
    return mean_and_sd([float(of(run)) for run in group.runs])[0] or 0.0


def _ratio(group: Group, reference: Group | None, stage: str) -> str:
    """How many times as long as the reference; the passes before and after a domain count as training.

    Medians, since a run that had to share its machine, or was halted, says nothing about its strategy.
    """
    if reference is None:
        return NOT_MEASURED
    stages = ("gradient", "train", "consolidate") if stage == "train" else (stage,)

    def seconds(run: Mapping[str, Any]) -> float:
        return sum(run["wall_seconds"].get(each, 0.0) for each in stages)

    own, theirs = (median(map(seconds, each.runs)) for each in (group, reference))
    return f"{own / theirs:.2f}" if theirs else NOT_MEASURED
