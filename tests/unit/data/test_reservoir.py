"""The reservoir holds a uniform sample of all that it was offered, however often it is put away and taken back."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch

from mllm_keeplora.data.reservoir import Reservoir
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import replay

DOMAINS = (3, 1, 2)  # records of three domains, six in all
ALL = [(domain, number) for domain, count in enumerate(DOMAINS) for number in range(count)]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def filled(capacity, seed, domains=DOMAINS):
    reservoir, generator = Reservoir(capacity), rng(seed)
    for domain, count in enumerate(domains):
        reservoir.offer(domain, count, generator)
    return reservoir


def test_the_reference_gives_every_set_and_every_record_the_same_chance():
    sets = replay.reservoir_distribution(len(ALL), 2)
    assert len(sets) == 15 and set(sets.values()) == {Fraction(1, 15)}
    for number in range(len(ALL)):
        assert sum(chance for held, chance in sets.items() if number in held) == Fraction(2, 6)


def test_after_n_records_each_set_of_them_is_held_with_the_same_probability():
    trials = 3000
    found = Counter(frozenset(map(ALL.index, filled(2, seed).references)) for seed in range(trials))
    expected = replay.reservoir_distribution(len(ALL), 2)
    assert set(found) <= set(expected)
    assert replay.chi_square(found, expected) < 42.6  # 14 degrees of freedom: exceeded by chance once in 10,000


def test_after_n_records_each_is_held_with_probability_capacity_over_n():
    trials, capacity = 3000, 4
    found = Counter(reference for seed in range(trials) for reference in filled(capacity, seed).references)
    assert sum(found.values()) == trials * capacity
    for reference in ALL:
        assert abs(found[reference] / trials - capacity / len(ALL)) < 4 * (2 / 9 / trials) ** 0.5


@pytest.mark.parametrize("capacity", [1, 3, 10, 50])
def test_it_holds_what_the_reference_holds_under_the_same_draws(capacity):
    counts, generator, offered, slots = (7, 12, 1), rng(5), [], {}
    for domain, count in enumerate(counts):
        for number in torch.randperm(count, generator=generator).tolist():
            offered.append((domain, number))
            if len(offered) > capacity:
                slots[len(offered)] = int(torch.randint(len(offered), (), generator=generator))
    expected = replay.reservoir(offered, capacity, slots.__getitem__)
    assert filled(capacity, 5, counts).references == expected and len(expected) == min(capacity, sum(counts))


def test_it_never_holds_more_than_its_capacity_nor_a_record_twice():
    reservoir, generator = Reservoir(5), rng(0)
    for domain in range(30):
        reservoir.offer(domain, domain % 4, generator)
        assert len(reservoir) == len(set(reservoir.references)) == min(5, reservoir.seen)
    assert reservoir.seen == sum(domain % 4 for domain in range(30))


def test_the_same_seed_gives_the_same_references_and_another_seed_others():
    assert filled(10, 1, (100, 100)).references == filled(10, 1, (100, 100)).references
    assert filled(10, 1, (100, 100)).references != filled(10, 2, (100, 100)).references


def test_one_that_was_put_away_in_between_goes_on_as_if_it_had_not_been(tmp_path):
    whole, generator = filled(4, 1), rng(9)
    whole.offer(3, 20, generator)
    write_tensors(tmp_path / "state.safetensors", {"buffer": filled(4, 1).state()})
    again = Reservoir(4)
    again.load(read_tensors(tmp_path / "state.safetensors")["buffer"])
    assert again.references == filled(4, 1).references and again.seen == sum(DOMAINS)
    again.offer(3, 20, rng(9))
    assert again.references == whole.references and again.seen == whole.seen
    assert again.state().dtype == torch.int64 and again.state().shape == (5, 2)


def test_an_empty_one_survives_too():
    again = filled(4, 1)
    again.load(Reservoir(4).state())
    assert len(again) == again.seen == 0


def test_the_state_of_one_of_another_capacity_is_refused():
    with pytest.raises(AssertionError, match="a reservoir of 3 does not fit into one of 4"):
        Reservoir(4).load(Reservoir(3).state())
