"""What a training does where its loss, its gradient or its factors are not finite, as `train.on_nonfinite` says.

    stop       ends the run
    skip(K)    leaves out the optimizer step; more than K of a unit's steps end the run
    rollback   takes back all steps since the last checkpoint and goes on behind their records; more than `ROLLBACKS`
               times in a unit end the run

Decided by what all processes see alike: the norm of the gradient that they have summed up, or the trained factors.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from mllm_keeplora.errors import Diverged
from mllm_keeplora.system import distributed, files
from mllm_keeplora.system.log import log
from mllm_keeplora.training.state import COMPLETE, DIGESTS, complete_checkpoint, last_checkpoint

ROLLBACKS = 3
EVENTS = "nonfinite.json"  # of a checkpoint: what happened before it
MEND = "lower train.lr or look at the data"


class RolledBack(Exception):
    """The training is to go on from another checkpoint, which lies there now."""


@dataclass(eq=False)
class Guard:
    """Deal with numbers that are not finite, and remember what was done.

    Attributes:
        mode: as `TrainConfig.on_nonfinite`.
        domain: what is trained, for messages.
        steps_per_epoch: optimizer steps.
        folder: of the checkpoints.
        identity: facts that a checkpoint of this training has.
        metrics_file: gets a JSON line for each event.
        facts: that such a line begins with.
        peak: `train.lr`.
        rate: of this optimizer step.
        seen: what was found in this optimizer step by this process.
        left_out: whether this optimizer step is left out.
        events: of this unit so far, in order.
    """

    mode: str
    domain: str
    steps_per_epoch: int
    folder: Path
    identity: Mapping[str, Any]
    metrics_file: Path
    facts: Mapping[str, Any]
    peak: float
    rate: float = 0.0
    seen: str = ""
    left_out: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        return self.mode == "stop"

    def resume(self, checkpoint: str | None) -> None:
        """Remember what happened before a checkpoint."""
        path = Path(checkpoint) / EVENTS if checkpoint is not None else None
        self.events = files.read_json(path) if path is not None and path.is_file() else []

    def begin_step(self, rate: float) -> None:
        self.rate, self.seen, self.left_out = rate, "", False

    def save(self, checkpoint: Path) -> None:
        """Leave in a checkpoint what happened before it."""
        if self.events:
            files.write_json(checkpoint / EVENTS, self.events)

    def end(self, what: str, state: TrainerState, mend: str = MEND) -> Diverged:
        """Make the sentence that ends the run."""
        last = last_checkpoint(self.folder, dict(self.identity))
        good = f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
        where = f"in domain {self.domain}, optimizer step {state.global_step}"
        return Diverged(f"{what} {where}; the learning rate was {self.rate:g} (train.lr {self.peak:g}), {good}; {mend}")

    def leave_out(self, state: TrainerState) -> None:
        """Leave out the step that is under way, or go back; all processes come here at the same time.

        Raises:
            Diverged: the run is to end.
            RolledBack: the training is to go on from the last checkpoint, behind this step.
        """
        what = self.seen or "the gradient is not finite"
        if not self.mode.startswith("skip"):
            self.go_back(what, state, state.global_step + 1)
            return
        most = int(re.sub(r"\D", "", self.mode))
        if len(self.events) == most:
            raise self.end(what, state, f"train.on_nonfinite {self.mode} has left out {most} steps; {MEND}")
        self._enter(what, "left out", state)
        self.left_out = True

    def go_back(self, what: str, state: TrainerState, behind: int) -> None:
        """Take back what was done since the last checkpoint; the training goes on behind that many steps.

        Raises:
            Diverged: the run is to end.
            RolledBack: it goes on.
        """
        checkpoint = last_checkpoint(self.folder, dict(self.identity))
        if self.mode != "rollback" or checkpoint is None:
            raise self.end(what, state)
        if len(self.events) == ROLLBACKS:
            raise self.end(what, state, f"train.on_nonfinite has rolled back {ROLLBACKS} times; {MEND}")
        self._enter(what, f"back to {Path(checkpoint).name}", state)
        distributed.barrier()  # all have found the checkpoint
        if distributed.is_main():
            self._write(Path(checkpoint), self.folder / f"checkpoint-{behind}", behind)
        distributed.barrier()
        raise RolledBack

    def _write(self, before: Path, now: Path, behind: int) -> None:
        """Write the checkpoint to go on from: an earlier one, at a later place in the data."""
        shutil.rmtree(now, ignore_errors=True)
        with files.written(now):
            shutil.copytree(before, now, ignore=shutil.ignore_patterns(COMPLETE, DIGESTS))
        told = files.read_json(now / "trainer_state.json")
        files.write_json(
            now / "trainer_state.json", told | {"global_step": behind, "epoch": behind / self.steps_per_epoch}
        )
        self.save(now)
        files.flush_all(now)
        complete_checkpoint(now, dict(self.identity))

    def _enter(self, what: str, done: str, state: TrainerState) -> None:
        event = {"optimizer_step": state.global_step, "nonfinite": what, "learning_rate": self.rate, "done": done}
        self.events.append(event)
        log.warning("%s: optimizer step %d: %s; %s", self.domain, state.global_step, what, done)
        if distributed.is_main():
            files.append_line(self.metrics_file, files.one_line({**self.facts, **event}).rstrip())
