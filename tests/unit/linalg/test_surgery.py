"""Gradient surgery: what a task gives up is what runs against another, and nothing else."""

from __future__ import annotations

import numpy as np
import torch

from mllm_keeplora.linalg.surgery import without_conflicts
from tests.oracles import ortho_lora

PAIR = ([1], [0])


def drawn(seed, tasks):
    return list(torch.randn(tasks, 3, 5, generator=torch.Generator().manual_seed(seed)))


def test_each_task_meets_the_others_as_the_reference_does():
    orders = ([2, 1], [0, 2], [1, 0])
    for seed in range(20):
        gradients = drawn(seed, 3)
        expected = ortho_lora.projected([each.numpy() for each in gradients], orders)
        for found, wanted in zip(without_conflicts(gradients, orders), expected, strict=True):
            assert np.allclose(found.numpy(), wanted, atol=1e-5)


def test_two_tasks_no_longer_conflict_and_grow_no_longer():
    conflicts = 0
    for seed in range(20):
        one, other = drawn(seed, 2)
        first, second = without_conflicts([one, other], PAIR)
        conflicts += bool((one * other).sum() < 0)
        assert (first * other).sum() > -1e-5 and (second * one).sum() > -1e-5
        assert first.norm() <= one.norm() + 1e-6 and second.norm() <= other.norm() + 1e-6
    assert 5 < conflicts < 15


def test_without_conflict_or_without_others_the_tensors_come_back_as_they_are():
    one = drawn(0, 1)[0]
    assert without_conflicts([one], [[]])[0] is one
    agreeing = [one, 2 * one]
    assert all(found is given for found, given in zip(without_conflicts(agreeing, PAIR), agreeing, strict=True))


def test_a_zero_gradient_changes_nothing():
    one, zero = drawn(0, 1)[0], torch.zeros(3, 5)
    first, second = without_conflicts([one, zero], PAIR)
    assert first is one and second is zero
