"""Passes over records outside of a training, and where records come from: each process runs its share of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_keeplora.adapters.mixers.mixing import look_at
from mllm_keeplora.data.collate import batches
from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.partition import IdleBatch, is_partitioned
from mllm_keeplora.system import distributed, watch


@dataclass
class Sources:
    """Where records are that the domain itself does not have.

    Attributes:
        anchors: gives the records of an anchor set by its name.
        trained: gives the training records of a domain by its name.
        names: of the units of the sequence, in order.
    """

    anchors: Callable[[str], Sequence[Record]] | None = None
    trained: Callable[[str], Sequence[Record]] | None = None
    names: Sequence[str] = ()
    read: dict[int, Sequence[Record]] = field(default_factory=dict)  # else a file is read again for every record

    def domain(self, index: int) -> Sequence[Record]:
        """Training records of a domain by its place."""
        if index not in self.read:
            self.read[index] = self.trained(self.names[index])
        return self.read[index]


def own_batches(
    model: Any, collate: Callable[[Sequence[Record]], dict], records: Sequence[Record], size: int
) -> Iterator[dict]:
    """Model inputs of this process's share of the records.

    Where weights are divided (ZeRO-3) all processes run equally many batches: those with fewer end with idle ones.
    """
    device, world = next(model.parameters()).device, distributed.world_size()
    for part in batches(records[distributed.rank() :: world], size):
        batch = {key: value.to(device) for key, value in collate(part).items()}
        look_at(model, batch)
        yield batch
        watch.stop_here()
    if is_partitioned(model) and world > 1:
        most, own = (math.ceil(len(records[rank::world]) / size) for rank in (0, distributed.rank()))
        for _ in range(most - own):
            batch = IdleBatch({key: value.to(device) for key, value in collate(records[:1]).items()})
            look_at(model, batch)
            yield batch
