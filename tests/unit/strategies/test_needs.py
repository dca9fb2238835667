"""What every registered strategy ships with, and what a run that takes something away from it is told."""

import pytest

from mllm_keeplora import load_config
from mllm_keeplora.adapters.stored import LIVE
from mllm_keeplora.checks.engine import unfit_for
from mllm_keeplora.config import StrategyConfig, shipped
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import STRATEGIES, Strategy, build_strategy, summary_of
from mllm_keeplora.strategies.baselines.ewc import EWC
from mllm_keeplora.sweeps.plan import load_sweep, tune_cell


def faults_of(name, stage, *overrides):
    config = load_config("mini_dcl_finetune", [f"strategy.name={name}", *overrides])
    return unfit_for(config, build_strategy(config.strategy), stage)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_has_a_sentence_about_it_and_runs_with_its_defaults(name):
    assert 20 < len(summary_of(name)) <= 130 and summary_of(name).endswith(".")
    assert faults_of(name, None) == []


@pytest.mark.parametrize("run", [name for name in shipped("runs") if name.startswith("mini_dcl_")])
def test_a_shipped_run_is_of_the_strategy_that_it_is_named_for(run):
    """And for its rule, where it has several that are not the default."""
    config = load_config(run)
    rule = config.strategy.options.get("rule")
    assert run == "_".join(filter(None, ("mini_dcl", config.strategy.name, rule)))
    assert unfit_for(config, build_strategy(config.strategy), None) == []


def test_every_strategy_of_the_comparison_has_a_run():
    sweep = load_sweep("mini_all")
    compared = {tune_cell(sweep, label, 1e-3).config().strategy.name for label in sweep.strategies}
    assert compared - {"keeplora"} == {
        load_config(name).strategy.name for name in shipped("runs") if name.startswith("mini_dcl_")
    }


def test_a_strategy_that_begins_no_branch_is_refused_before_anything_runs(monkeypatch):
    class Empty(Strategy):
        pass

    monkeypatch.setitem(STRATEGIES, "empty", Empty)
    with pytest.raises(UserError, match=r"strategy\.name 'empty': Empty defines no before_domain \(x\.yaml\)"):
        build_strategy(StrategyConfig(name="empty"), "x.yaml")


def test_each_need_that_zero3_does_not_meet_is_told(monkeypatch):
    monkeypatch.setattr(EWC, "needs", frozenset({"parameters", "forwards"}))
    (fault,) = faults_of("ewc", 3, "deepspeed=zero3")
    assert "whole" in fault and "more often in one process than in another" in fault
    monkeypatch.setattr(EWC, "needs", frozenset({"forwards"}))
    assert faults_of("ewc", 2, "deepspeed=zero2") == [] and "whole" not in faults_of("ewc", 3, "deepspeed=zero3")[0]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_refused_where_it_takes_away_what_is_needed(name, stage):
    needs = STRATEGIES[name](STRATEGIES[name].Options()).needs
    taken = {"gradients"} if stage == 2 else {"gradients", "parameters", "forwards"}
    faults = faults_of(name, stage, f"deepspeed=zero{stage}")
    assert len(faults) == bool(needs & taken)
    assert all(f"'zero{stage}'" in fault and f"strategy {name} " in fault for fault in faults)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_projector_trained_in_full_is_refused_where_branches_are_weighed_by_the_question(name):
    faults = faults_of(name, None, "adapters.projector=full")
    assert len(faults) == (STRATEGIES[name].combine in LIVE)
    assert all("allowed: keeplora, frozen" in fault for fault in faults)


def test_a_projector_whose_steps_would_be_rounded_off_is_refused():
    half, full = "base.dtype=bfloat16", "adapters.projector=full"
    (fault,) = faults_of("finetune", None, half, full)
    assert "rounded off" in fault and "zero2" in fault
    for fine in ([half], [full], [half, full, "base.quantization=nf4"]):
        assert faults_of("finetune", None, *fine) == []
    assert faults_of("finetune", 2, half, full, "deepspeed=zero2") == []
