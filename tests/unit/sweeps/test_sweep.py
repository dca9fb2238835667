"""The rule by which a sweep chooses, and the faults of a sweep's YAML."""

from __future__ import annotations

import pytest
import yaml

from mllm_keeplora.config import load_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.sweeps.plan import TuneConfig, Tuning, final_cell, load_sweep, tune_cell

TUNE = TuneConfig(grid=[1e-3, 2e-3, 4e-3], factor=2, extensions=2)


@pytest.fixture
def write(tmp_path):
    def build(**changes):
        values = {
            "name": "small",
            "run": "mini_dcl",
            "strategies": {"finetune": ["strategy.name=finetune"], "keeplora": []},
            "tune": {"grid": [1e-3, 2e-3]},
            "final": {"seeds": [1, 2]},
            "output": str(tmp_path / "out"),
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return build


def test_the_highest_score_is_chosen_and_the_smaller_value_of_equals():
    assert Tuning({1e-3: 50.0, 2e-3: 70.0, 4e-3: 60.0}).best == 2e-3
    assert Tuning({4e-3: 70.0, 2e-3: 70.0, 1e-3: 60.0}).best == 2e-3
    assert Tuning({1e-3: None, 2e-3: 10.0}).best == 2e-3
    assert Tuning({1e-3: None}).best is None


def test_a_best_inside_the_grid_ends_the_search():
    assert Tuning({1e-3: 50.0, 2e-3: 70.0, 4e-3: 60.0}).next_value(TUNE) is None


def test_a_best_at_the_upper_edge_extends_the_grid_until_it_lies_inside():
    tuning = Tuning({1e-3: 50.0, 2e-3: 60.0, 4e-3: 70.0})
    assert tuning.next_value(TUNE) == 8e-3
    tuning.scores[8e-3] = 75.0
    assert tuning.next_value(TUNE) == 16e-3
    tuning.scores[16e-3] = 40.0
    assert tuning.next_value(TUNE) is None and not tuning.is_at_edge()


def test_a_best_at_the_lower_edge_extends_the_grid_downwards():
    tuning = Tuning({1e-3: 70.0, 2e-3: 60.0, 4e-3: 50.0})
    assert tuning.next_value(TUNE) == 5e-4
    tuning.scores[5e-4] = 71.0
    assert tuning.next_value(TUNE) == 2.5e-4


def test_the_grid_grows_no_further_than_it_may_and_says_that_the_best_is_at_the_edge():
    tuning = Tuning({1e-3: 50.0, 2e-3: 60.0, 4e-3: 70.0, 8e-3: 71.0, 16e-3: 72.0})
    assert tuning.next_value(TUNE) is None and tuning.is_at_edge()


def test_the_grid_never_asks_for_what_was_tried_already():
    tune = TuneConfig(grid=[1e-3], factor=1.0000001, extensions=3)
    assert Tuning({1e-3: 5.0}).next_value(tune) is None


def test_whole_numbers_stay_whole():
    assert Tuning({128.0: 1.0, 256.0: 2.0}).next_value(TuneConfig(grid=[128, 256])) == 512


def test_a_run_that_failed_beyond_the_best_counts_as_tried():
    tuning = Tuning({1e-3: 50.0, 2e-3: 60.0, 4e-3: 70.0, 8e-3: None})
    assert tuning.best == 4e-3 and tuning.next_value(TUNE) is None


def test_cells_differ_from_the_run_by_strategy_setting_seed_and_split_alone(write):
    sweep = load_sweep(write())
    base = load_config("mini_dcl").result_defining()
    cell = tune_cell(sweep, "keeplora", 2e-3).config().result_defining()
    changed = {key for key in base if base[key] != cell[key]}
    assert changed == {"name", "train.lr", "eval.split", "eval.domains", "eval.zero_shot"}
    final = final_cell(sweep, "keeplora", 2e-3, 2).config().result_defining()
    assert {key for key in base if base[key] != final[key]} == {"name", "train.lr", "seed"}


def test_another_choice_is_another_run(write):
    sweep = load_sweep(write())
    folders = {final_cell(sweep, "keeplora", value, seed).folder for value in (1e-3, 2e-3) for seed in (1, 2)}
    assert len(folders) == 4


def test_runs_share_the_base_s_answers_unless_the_sweep_says_otherwise(write, tmp_path):
    sweep = load_sweep(write())
    shared = {
        final_cell(sweep, label, 2e-3, seed).config().eval.base_answers for label in sweep.strategies for seed in (1, 2)
    }
    assert shared == {str(tmp_path / "out" / "base_answers")}
    sweep = load_sweep(write(final={"seeds": [1], "overrides": ["eval.base_answers=null"]}))
    assert final_cell(sweep, "keeplora", 2e-3, 1).config().eval.base_answers is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategies": {}}, "strategies"),
        ({"tune": {"grid": []}}, "tune.grid"),
        ({"tune": {"grid": [1e-3, 1e-3]}}, "twice"),
        ({"tune": {"grid": [1e-3], "factor": 1.0}}, "tune.factor"),
        ({"final": {"seeds": [1, 1]}}, "twice"),
        ({"runs": "mini_dcl"}, "runs is not a known key"),
        ({"run": "nowhere"}, "unknown name 'nowhere'"),
        ({"strategies": {"a": [], "b": ["strategy.name=keeplora"]}}, "strategies a and b have the same settings"),
        ({"tune": {"grid": [0.5, 2.0], "key": "train.warmup_ratio"}}, "train.warmup_ratio"),
        ({"strategies": {"x": ["train.rate=3"]}}, "train.rate is not a known key"),
        ({"tune": {"grid": [1e-3], "key": "train.bogus"}}, "train.bogus is not a known key"),
    ],
)
def test_a_fault_of_the_yaml_is_named_before_anything_runs(write, changes, told):
    with pytest.raises(UserError, match=told):
        load_sweep(write(**changes))


def test_an_unknown_sweep_lists_the_shipped_ones():
    with pytest.raises(UserError, match="mini_dcl"):
        load_sweep("nothing")
