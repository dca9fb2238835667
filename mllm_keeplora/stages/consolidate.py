"""Stage `consolidate`: grow what is kept, then merge from the pristine base and all factors."""

from __future__ import annotations

from typing import Any

from mllm_keeplora.adapters.stored import save_growth, write_manifest
from mllm_keeplora.runs import Unit
from mllm_keeplora.stages.learner import Learner, add_facts, ranks_of
from mllm_keeplora.system import distributed, files


def consolidate(learner: Learner, unit: Unit) -> dict[str, Any]:
    """Grow what is kept, with the finished branch still active; then merge."""
    folder = learner.run.folder(unit)
    if learner.open_unit != unit:
        learner.start(unit)
        learner.reopen(unit, trained=True)
    context = learner.context(unit, "consolidate")
    before = {layer: basis.rank for layer, basis in learner.kept.items()}
    learner.strategy.after_domain(context)
    replacement = context.replacement
    if replacement is not None and replacement.instead_of == "all" and learner.strategy.combine != "merge":
        name = type(learner.strategy).__name__
        raise RuntimeError(f"{name} answers as one branch instead of all, but combines by {learner.strategy.combine}")
    if distributed.is_main():
        carried = learner.adapters.branch.carried
        how = learner.strategy
        # Where the domain is told, its branch answers alone: what mixed it in training is done.
        mixer = None if how.combine == "oracle" else context.answering or learner.adapters.mixer
        write_manifest(folder, how.combine, how.start_from, carried, mixer, replacement, how.recalls)
        save_growth(folder, learner.kept, before, context.forgotten)
        state = learner.strategy.state_dict()
        if state:
            files.write_tensors(folder.strategy, state)
        add_facts(folder, context.facts)
    distributed.barrier()
    # The branch is closed, and everything read back from its file: pristine weights plus all factors are the merge.
    learner.invalidate()
    learner.bring_to(unit.index, asked=unit.domains[0])
    return ranks_of(learner.kept)
