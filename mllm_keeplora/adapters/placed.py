"""A base's model, brought to where a run has it after any of its units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_keeplora.adapters.branches import Adapters
from mllm_keeplora.adapters.stored import is_oracle, past_of
from mllm_keeplora.runs import RunDir, Unit


class PlacedModel:
    """Bring the adapters of a run's base to the end of a unit; memory is only a cache of the run directory."""

    def __init__(self, adapters: Adapters, run: RunDir):
        self.adapters = adapters
        self.run = run
        self._place: tuple | None = None  # (units, asked) that the adapters hold; None: changed since they were read

    def at(self, units: Sequence[Unit], asked: str | None = None) -> Any:
        """Give the model as it is after some units: pristine base plus stored factors.

        Args:
            units: in order, from the first; none for the untouched base.
            asked: the domain or suite to be answered; it matters only where each domain has its own branch (oracle).
        """
        place = (len(units), asked if is_oracle(self.run, units) else None)
        if place != self._place:
            past = past_of(self.run, units, asked)
            self.adapters.restore(past.factors, past.full, past.mixer, past.prototypes)
            self._place = place
        return self.adapters.model

    def invalidate(self) -> None:
        """Forget where the model is, since it was changed: the next `at` reads the files."""
        self._place = None
