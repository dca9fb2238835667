"""What every registered strategy ships with, and what a run that takes something away from it is told."""

import pytest

from mllm_keeplora import load_config
from mllm_keeplora.adapters.stored import LIVE
from mllm_keeplora.check import _unfit_for
from mllm_keeplora.strategies import STRATEGIES, build_strategy, summary_of


def faults_of(name, stage, *overrides):
    config = load_config("mini_dcl" if name == "keeplora" else f"mini_dcl_{name}", list(overrides))
    return _unfit_for(config, build_strategy(config.strategy), stage)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_has_a_run_of_its_own_and_a_sentence_about_it(name):
    config = load_config("mini_dcl" if name == "keeplora" else f"mini_dcl_{name}")
    assert config.strategy.name == name and faults_of(name, None) == []
    assert 20 < len(summary_of(name)) <= 130 and summary_of(name).endswith(".")


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_refused_where_it_takes_away_what_is_needed(name, stage):
    needs = STRATEGIES[name](STRATEGIES[name].Options()).needs
    taken = {"gradients"} if stage == 2 else {"gradients", "parameters"}
    faults = faults_of(name, stage, f"deepspeed=zero{stage}")
    assert len(faults) == bool(needs & taken)
    assert all(f"'zero{stage}'" in fault and f"strategy {name} needs" in fault for fault in faults)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_projector_trained_in_full_is_refused_where_branches_are_weighed_by_the_question(name):
    faults = faults_of(name, None, "adapters.projector=full")
    assert len(faults) == (STRATEGIES[name].combine in LIVE)
    assert all("allowed: keeplora, frozen" in fault for fault in faults)
