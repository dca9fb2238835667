"""Stage `diagnose`: what a unit did to the model, measured on a few records of every set."""

from __future__ import annotations

from typing import Any

from mllm_keeplora.adapters.stored import kept_of, parts_of, updates_of
from mllm_keeplora.runs import Unit
from mllm_keeplora.stages.effects import capacity_of, changes_of, inputs_of, sets_to_look_at, slices_of
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.system import distributed, files


def diagnose(learner: Learner, unit: Unit) -> dict[str, Any]:
    """Measure what the unit did to the model, on a few records of every set; nothing is changed."""
    folder, done = learner.folder(unit), learner.units[: unit.index]
    learner.bring_to(unit.index, asked=unit.domains[0])
    parts, before = parts_of(learner.run, done), kept_of(learner.run, done[:-1])
    history = updates_of(learner.run, done)
    earlier = history[:-1] if learner.strategy.start_from == "previous" else []
    merged = learner.adapters.mode == "merged"
    dtype = next(learner.base.model.parameters()).dtype if merged else None
    everything, samples = learner.config.eval.domains == "all", learner.config.diagnostics.samples
    facts = {
        "capacity": capacity_of(parts, learner.kept),
        "changes": changes_of(history[-1], earlier, learner.adapters.pristine, before, dtype),
        "inputs": {
            name: inputs_of(
                learner.adapters.model, learner.base, records, history[-1], slices_of(learner.kept, parts),
                learner.config.train.probe_batch_size,
            )
            for name, records in sets_to_look_at(learner.benchmark, learner.units, unit, everything, samples)
        },
    }  # fmt: skip
    if distributed.is_main():
        files.write_json(folder.diagnostics, facts)
    return {}
