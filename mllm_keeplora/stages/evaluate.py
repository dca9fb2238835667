"""Stage `evaluate`: one row of the score matrix, set by set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mllm_keeplora.eval.base_answers import asked_once
from mllm_keeplora.eval.rows import collapses, evaluate_named, sets_after
from mllm_keeplora.runs import BASE_UNIT, RunDir, Unit
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.system.log import log


def evaluate(learner: Learner, unit: Unit) -> None:
    """Fill a unit's row of the score matrix; cells that are measured already are left alone."""
    config, run, benchmark = learner.config, learner.run, learner.benchmark
    shared = config.eval.base_answers if unit == BASE_UNIT else None

    graded = benchmark.after({each for learnt in run.units[: unit.index] for each in learnt.domains})

    def answered(name: str) -> dict[str, Any]:
        learner.bring_to(unit.index, asked=name)
        return evaluate_named(learner.base, learner.adapters.model, graded, name, config, run.folder(unit))

    def ask(name: str) -> dict[str, Any]:
        if shared is None:
            return answered(name)
        return asked_once(Path(shared), run, config, benchmark, name, partial(answered, name))

    names = sets_after(unit, run.units, benchmark, config)
    asked = [run.once(f"{unit.key}/evaluate/{name}", partial(ask, name)) for name in names]
    if any(asked):
        scores = {name: run.ledger.stages[f"{unit.key}/evaluate/{name}"]["score"] for name in names}
        told = (f"{name} " + ("not graded" if score is None else f"{score:.1f}") for name, score in scores.items())
        log.info("after %s: %s", unit.name, ", ".join(told))
        units = [each for each in [BASE_UNIT, *run.units] if each.index <= unit.index]
        now = collapses({each.key: _scores(run, each) for each in units}, config.eval.collapse_alarm)
        before = collapses({each.key: _scores(run, each) for each in units[:-1]}, config.eval.collapse_alarm)
        for alarm in now[len(before) :]:
            log.warning("ALARM in stage %s/evaluate: %s", unit.key, alarm)


def _scores(run: RunDir, unit: Unit) -> dict[str, float | None]:
    """What the ledger has of a unit's row: set -> score in percent."""
    stages, start = run.ledger.stages, f"{unit.key}/evaluate/"
    return {stage.removeprefix(start): stages[stage]["score"] for stage in stages if stage.startswith(start)}
