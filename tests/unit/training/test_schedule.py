"""The one-cycle schedule: rates and beta 1 of a training, step by step, also one that was interrupted."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.adapters.branches import adapters_for
from mllm_keeplora.config import TrainConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.training.arguments import rehearse, training_arguments
from mllm_keeplora.training.schedule import one_cycle
from tests.oracles import dual as oracle
from tests.support.keeplora import context_of, fit

# Step of 100 -> rate at a peak of 1e-3, and beta 1: what torch gives with its own defaults, written down once.
EXPECTED = {
    0: ("4.00e-05", "0.950"),
    29: ("1.00e-03", "0.850"),
    30: ("9.99e-04", "0.850"),
    60: ("5.89e-04", "0.891"),
    99: ("4.00e-09", "0.950"),
}


def optimizer_of(*rates, kind=torch.optim.AdamW):
    return kind([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def taken(optimizer, schedule, steps):
    """Rate and first momentum of every group at each step."""
    found = []
    for _ in range(steps):
        found.append([(group["lr"], group["betas"][0]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def test_rates_and_beta_are_those_of_the_published_recipe():
    optimizer = optimizer_of(1e-3)
    found = taken(optimizer, one_cycle(optimizer, 100), 100)
    assert {step: (f"{found[step][0][0]:.2e}", f"{found[step][0][1]:.3f}") for step in EXPECTED} == EXPECTED


@pytest.mark.parametrize("steps", [7, 10, 53])
def test_every_step_is_that_of_the_reference(steps):
    optimizer = optimizer_of(3e-3)
    for step, [found] in enumerate(taken(optimizer, one_cycle(optimizer, steps), steps)):
        assert found == pytest.approx(oracle.one_cycle(step, steps, 3e-3), rel=1e-9)


def test_every_group_has_a_peak_of_its_own():
    optimizer = optimizer_of(1e-3, 2e-5)
    rates = [[rate for rate, _ in groups] for groups in taken(optimizer, one_cycle(optimizer, 10), 10)]
    assert [max(each) for each in zip(*rates, strict=True)] == pytest.approx([1e-3, 2e-5])
    assert all(second == pytest.approx(first / 50) for first, second in rates)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_short_trainings_take_all_their_steps(steps):
    optimizer = optimizer_of(1e-3)
    assert len(taken(optimizer, one_cycle(optimizer, steps), steps)) == steps


class Watched(Finetune):
    """Notes what the optimizer is set to at each step of a training."""

    def around_step(self, context, phase, step):
        if phase == "grad":
            groups = step.optimizer.param_groups
            self.noted = [*getattr(self, "noted", []), [(group["lr"], group["betas"][0]) for group in groups]]


@pytest.mark.parametrize("epochs", [2.0, 1.5])
def test_a_training_has_the_rates_of_its_own_number_of_steps(epochs, new_base, tiny_records, tmp_path):
    """Twelve records by fours: six optimizer steps, or five; what is trained in full has a peak of its own."""
    base, strategy = new_base("full"), Watched(FinetuneOptions(rank=2))
    context = context_of(base, adapters_for(base, "full", "merged", 0.0), {}, tiny_records["Alpha"])
    context.branches.open(strategy.before_domain(context))
    facts = fit(strategy, context, tmp_path, lr=1e-2, lr_projector=1e-4, epochs=epochs, schedule="one_cycle")
    steps = {2.0: 6, 1.5: 5}[epochs]
    assert facts["steps"] == steps
    alone = optimizer_of(1e-4, 1e-2)  # in the order of the parameters, the projector first
    expected = taken(alone, one_cycle(alone, steps), steps)
    assert strategy.noted == [[pytest.approx(pair) for pair in groups] for groups in expected]


def settings_with(**args):
    return TrainConfig(schedule="one_cycle", args=args)


def test_the_cycle_can_be_shaped_and_what_torch_refuses_is_told(tmp_path):
    made = training_arguments(settings_with(lr_scheduler_kwargs={"pct_start": 0.5}), 1.0, tmp_path, 0, None, bf16=False)
    optimizer = optimizer_of(1e-3)
    found = taken(optimizer, one_cycle(optimizer, 10, made.lr_scheduler_kwargs), 10)
    assert found[4][0] == pytest.approx((1e-3, 0.85))
    rehearse(settings_with())
    for args, told in (
        ({"lr_scheduler_kwargs": {"peak": 1}}, "peak"),
        ({"optim": "adafactor"}, "momentum or beta1"),
    ):
        with pytest.raises(UserError, match=rf"train.schedule 'one_cycle': .*{told}"):
            rehearse(settings_with(**args))


def test_an_unknown_schedule_is_told_with_those_that_are_known(tmp_path):
    with pytest.raises(UserError, match=r"train.schedule 'zigzag' is unknown; known: .*cosine, .*one_cycle, "):
        training_arguments(TrainConfig(schedule="zigzag"), 1.0, tmp_path, 0, None, bf16=False)
