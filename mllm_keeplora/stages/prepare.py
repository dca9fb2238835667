"""Stage `prepare`: what the strategy keeps of the untouched base."""

from __future__ import annotations

from typing import Any

from mllm_keeplora.runs import BASE_UNIT
from mllm_keeplora.stages.learner import Learner, ranks_of
from mllm_keeplora.system import distributed, files


def prepare(learner: Learner) -> dict[str, Any]:
    """Find once what the strategy keeps of the untouched base (principal subspaces of the weights)."""
    learner.bring_to(0)
    context = learner.context(BASE_UNIT, "prepare", records=[])
    learner.strategy.prepare(context)
    if distributed.is_main():
        files.write_tensors(learner.run.kept_by_prepare, {name: basis.columns for name, basis in learner.kept.items()})
    distributed.barrier()
    learner.invalidate()
    logged = {"logged": context.facts} if context.facts else {}
    return {"target_layers": len(learner.base.parts.target_layers), **ranks_of(learner.kept), **logged}
