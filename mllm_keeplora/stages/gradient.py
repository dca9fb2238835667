"""Stage `gradient`: the start of a unit's branch, for KeepLoRA after a gradient pass."""

from __future__ import annotations

from typing import Any

from mllm_keeplora.adapters import Branch
from mllm_keeplora.runs import Unit
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.system import distributed, files


def gradient(learner: Learner, unit: Unit) -> dict[str, Any]:
    """Open the unit's branch (for KeepLoRA after a gradient pass) and keep its start on disk."""
    learner.start(unit)
    context = learner.context(unit, "gradient")
    begun = learner.strategy.before_domain(context)
    if begun is not None:  # else the strategy has opened it, which is deprecated
        learner.adapters.open(begun)
    branch = learner.adapters.branch
    assert branch is not None, f"{type(learner.strategy).__name__}.before_domain began no branch"
    folder = learner.run.folder(unit)
    if distributed.is_main():
        branch.save(folder.init)
        files.write_json(folder.gradient, context.facts)
    if distributed.world_size() > 1:
        # Singular vectors may differ in sign or order between processes: all start from the main one's file.
        distributed.barrier()
        now = learner.adapters
        now.restore(now.past, now.past_full, now.past_mixer, now.past_prototypes)
        now.open(Branch.load(folder.init))
    learner.open_unit = unit
    return {"rank_min": min(branch.ranks.values(), default=0), "rank_max": max(branch.ranks.values(), default=0)}
