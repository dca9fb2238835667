"""Go back in a run: forget a stage and all that rest on it, so that they are done again."""

from __future__ import annotations

from mllm_keeplora.errors import UserError, known
from mllm_keeplora.runs import BASE_UNIT, RunDir, is_leaf, stage_of
from mllm_keeplora.system import distributed

KINDS = ("gradient", "train", "consolidate", "diagnose", "evaluate")  # stages of a unit, in order


def redo(run: RunDir, stage: str) -> None:
    """Take a stage and all that rest on it out of the ledger, and then their artefacts from the disk.

    Args:
        run: is opened, and locked by this process.
        stage: as in the ledger (`02_Med/train`), or a unit (`02_Med`) for all of its stages.

    Raises:
        UserError: the stage is not done, or was inherited from another run.
    """
    order = _in_order(run)
    first = f"{stage}/gradient" if f"{stage}/gradient" in order else stage
    if first not in order:
        raise UserError(f"--redo {stage}: {run.path} has not done that; done are {known(order)}")
    parent = run.ledger.parent
    inherited = [unit.key for unit in run.units[: parent["after"]]] if parent is not None else []
    if inherited and not is_leaf(first) and first.split("/")[0] in ("prepare", *inherited):
        raise UserError(f"--redo {stage}: it was inherited from {parent['run']}; go back there")
    undone = [first] if is_leaf(first) else order[order.index(first) :]
    gone = [name for name in run.ledger.artefacts or () if stage_of(name) in undone]
    for each in undone:
        del run.ledger.stages[each]
    for name in gone:
        del run.ledger.artefacts[name]
    run.note(f"gone back to {first}: to be done again are {', '.join(undone)}")
    if distributed.is_main():
        for name in gone:
            (run.path / name).unlink(missing_ok=True)


def _in_order(run: RunDir) -> list[str]:
    """The stages that are done, in the order of the sequence: each learning one rests on all of those before it."""
    keys = [BASE_UNIT.key, "prepare", *(unit.key for unit in run.units)]

    def place(stage: str) -> tuple[int, int]:
        unit, _, rest = stage.partition("/")
        return keys.index(unit), KINDS.index(rest.split("/")[0]) if rest else 0

    return sorted(run.ledger.stages, key=place)
