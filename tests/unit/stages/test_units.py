"""What joint training passes over: every record as often as the sequence passes over it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from mllm_keeplora.stages.units import plan_units, training_records

RECORDS = {"Alpha": ["a", "b"], "Beta": ["c", "d", "e"], "Gamma": [f"g{number}" for number in range(10)]}
EPOCHS = {"Alpha": 1.0, "Beta": 2.0, "Gamma": 1.3}
BENCHMARK = SimpleNamespace(train_records=RECORDS.__getitem__)


def config(seed: int) -> SimpleNamespace:
    return SimpleNamespace(seed=seed, train_of=lambda name: SimpleNamespace(epochs=EPOCHS[name]))


def union(seed: int) -> list[str]:
    [unit] = plan_units(list(RECORDS), "union")
    records, epochs = training_records(unit, BENCHMARK, config(seed))
    assert epochs == 1.0
    return list(records)


def test_a_union_has_every_record_as_often_as_the_sequence_passes_over_it():
    found = Counter(union(0))
    assert [found[name] for name in "abcde"] == [1, 1, 2, 2, 2]
    last = [found[name] for name in RECORDS["Gamma"]]
    assert sorted(last) == [1] * 7 + [2] * 3
    passes = {name: len(records) * EPOCHS[name] for name, records in RECORDS.items()}
    assert found.total() == sum(passes.values())


def test_which_records_a_broken_epoch_has_hangs_on_the_seed_alone():
    assert union(0) == union(0)
    assert len({tuple(union(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("name", RECORDS)
def test_a_domain_by_itself_has_its_own_records_and_epochs(name):
    unit = next(unit for unit in plan_units(list(RECORDS), "sequential") if unit.name == name)
    assert training_records(unit, BENCHMARK, config(0)) == (RECORDS[name], EPOCHS[name])
