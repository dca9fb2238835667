"""What is trained at once: one domain of a sequential stream, or all of them for a union (joint training)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.data.store import Selection
from mllm_keeplora.runs import Unit
from mllm_keeplora.training.seeds import stage_seed


def plan_units(domains: list[str], stream: str) -> list[Unit]:
    """Plan the units of a sequence: `sequential` trains each domain by itself, `union` all at once, `none` nothing."""
    if stream == "union":
        return [Unit(1, "joint", tuple(domains))]
    if stream == "none":
        return []
    return [Unit(index, name, (name,)) for index, name in enumerate(domains, start=1)]


def token_limit(domains: Sequence[str], config: RunConfig) -> int | None:
    """Find the most tokens that any domain allows a record, since batches may join several; None for no limit."""
    limits = {config.train_of(name).max_length for name in domains}
    return None if None in limits else max(limits, default=None)


def training_records(unit: Unit, benchmark: Benchmark, config: RunConfig) -> tuple[Sequence[Record], float]:
    """Give the records of a unit and the number of epochs over them.

    A union repeats each domain's records by that domain's own epochs (a fraction by a seeded sample) and is passed
    once, so that joint training sees every record exactly as often as the sequence does.
    """
    if len(unit.domains) == 1:
        name = unit.domains[0]
        return benchmark.train_records(name), config.train_of(name).epochs
    from torch.utils.data import ConcatDataset

    sources, places, start = [], array("q"), 0
    for name in unit.domains:
        records, epochs = benchmark.train_records(name), config.train_of(name).epochs
        sampler = random.Random(stage_seed(config.seed, name, "union"))
        own = range(start, start + len(records))
        places.extend([*own] * int(epochs) + sampler.sample(own, round(len(own) * (epochs % 1))))
        sources.append(records)
        start += len(records)
    return Selection(ConcatDataset(sources), places), 1.0
