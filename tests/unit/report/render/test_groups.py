"""Seeds of one setting are one group; what cannot be compared is refused."""

from __future__ import annotations

import copy
import statistics

import pytest

from mllm_keeplora.report.render.comparison import costs
from mllm_keeplora.report.render.groups import (
    find_group,
    group_runs,
    mean_and_sd,
    mean_results,
    paired_differences,
    shares_of_upper,
    spread_text,
    trade_off_curves,
)
from mllm_keeplora.report.render.view import METRICS, score_sheet

LAST = next(metric for metric in METRICS if metric.key == "last")
BWT = next(metric for metric in METRICS if metric.key == "bwt")


@pytest.fixture
def make(results):
    """Function (strategy, seed, last, lr=...) -> results as a sweep's cell leaves them."""

    def build(strategy, seed, last, lr=1e-3, **changes):
        made = copy.deepcopy(results)
        made |= {"name": strategy, "strategy": strategy, "seed": seed, **changes}
        made["settings"] = {"strategy.name": strategy, "train.lr": lr}
        made["identity"] = {"split": "test", "data": "d1", "generator": "g1", "base": "b1"}
        made["metrics"] |= {"last": last, "bwt": last - 90, "plasticity": last + 5}
        return made

    return build


def test_runs_that_differ_by_seed_alone_are_one_group(make):
    groups = group_runs([make("keeplora", 2, 82.0), make("finetune", 1, 50.0), make("keeplora", 1, 80.0)])
    assert [(group.label, group.seeds) for group in groups] == [("keeplora", [1, 2]), ("finetune", [1])]
    assert groups[0].metric("last") == [80.0, 82.0]


def test_settings_that_differ_tell_groups_of_one_name_apart(make):
    groups = group_runs([make("keeplora", 0, 82.0, lr=2e-3), make("keeplora", 0, 80.0), make("joint", 0, 90.0)])
    assert [group.label for group in groups] == ["keeplora, lr 0.002", "keeplora, lr 0.001", "joint"]
    assert [group.family for group in groups] == ["keeplora", "keeplora", "joint"]


def test_orders_of_the_same_domains_are_different_groups(make):
    one, other = make("keeplora", 0, 82.0), make("keeplora", 0, 80.0)
    other["domains"] = other["domains"][::-1]
    assert [group.label for group in group_runs([one, other])] == [
        "keeplora, order RS-Med-AD-Sci-Fin",
        "keeplora, order Fin-Sci-AD-Med-RS",
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("data", "d2"), ("base", "b2"), ("split", "validation"), ("generator", "g2")]
)
def test_runs_on_other_data_or_another_base_are_refused(make, key, value):
    stranger = make("finetune", 1, 50.0)
    stranger["identity"][key] = value
    with pytest.raises(ValueError, match=f"their {key} differs"):
        group_runs([make("keeplora", 1, 80.0), stranger])


@pytest.mark.parametrize("key", ["eval.limit", "eval.suite_limit", "eval.max_new_tokens"])
def test_runs_asked_other_questions_are_refused(make, key):
    stranger = make("finetune", 1, 50.0)
    stranger["settings"][key] = 50
    with pytest.raises(ValueError, match=f"{key} is 50 and None"):
        group_runs([make("keeplora", 1, 80.0), stranger])


def test_results_that_do_not_tell_what_they_were_measured_on_are_refused_with_the_remedy(make):
    old = make("finetune", 1, 50.0)
    del old["identity"]
    with pytest.raises(ValueError, match=r"finetune \(number 2: .* does not tell .*mllm-keeplora report"):
        group_runs([make("keeplora", 1, 80.0), old])


def test_strategies_that_share_a_name_are_told_apart(make):
    groups = group_runs([make("keeplora", 1, 80.0, name="mini"), make("finetune", 1, 50.0, name="mini")])
    assert [group.label for group in groups] == ["keeplora", "finetune"]


def test_the_same_setting_and_seed_twice_is_refused(make):
    with pytest.raises(ValueError, match="given twice"):
        group_runs([make("keeplora", 1, 80.0), make("keeplora", 1, 80.0)])


def test_mean_and_sample_deviation_agree_with_the_standard_library():
    values = [81.2, 79.9, 80.4]
    assert mean_and_sd(values) == (statistics.fmean(values), statistics.stdev(values))
    assert mean_and_sd([80.0]) == (80.0, None)
    assert mean_and_sd([80.0, None]) == (None, None)
    assert mean_and_sd([]) == (None, None)


def test_a_spread_is_written_without_a_sign():
    assert spread_text(LAST, [80.0, 82.0]) == "81.0 ±1.4"
    assert spread_text(BWT, [-3.0, -1.0]) == "-2.0 ±1.4"
    assert spread_text(LAST, [80.0]) == "80.0"
    assert spread_text(LAST, [None]) == "–"


def test_differences_are_paired_by_seed_not_by_place(make):
    ours = group_runs([make("keeplora", 3, 83.0), make("keeplora", 1, 81.0)])[0]
    theirs = group_runs([make("finetune", 1, 51.0), make("finetune", 2, 0.0), make("finetune", 3, 60.0)])[0]
    assert paired_differences(ours, theirs, "last") == {1: 30.0, 3: 23.0}


def test_of_two_variants_of_the_reference_that_of_its_name_is_meant(make):
    plain, other = make("finetune", 1, 50.0), make("olora", 1, 50.0)
    carried = make("finetune", 1, 50.0, lr=4e-3, name="finetune_carried")
    assert find_group(group_runs([carried, other, plain]), "finetune").family == "finetune"
    assert find_group(group_runs([carried, other]), "finetune").family == "finetune_carried"
    plain["name"] = "mine"
    assert find_group(group_runs([carried, other, plain]), "finetune") is None


def test_the_share_of_joint_is_taken_of_its_mean(make):
    groups = group_runs([make("joint", 1, 90.0), make("joint", 2, 100.0), make("keeplora", 1, 76.0)])
    assert shares_of_upper(groups[1], find_group(groups, "joint")) == [0.8]
    assert shares_of_upper(groups[1], None) == []
    nothing = group_runs([make("joint", 1, 0.0)])
    assert shares_of_upper(groups[1], nothing[0]) == []


def test_mean_results_average_cell_by_cell_and_keep_what_was_not_measured(make):
    one, other = make("keeplora", 1, 80.0), make("keeplora", 2, 82.0)
    other["score_matrix"][0][1] = one["score_matrix"][0][1] + 2
    one["score_matrix"][2][3] = None
    mean = mean_results(group_runs([one, other])[0])
    assert mean["score_matrix"][0][1] == pytest.approx(one["score_matrix"][0][1] + 1)
    assert score_sheet(mean).stages[2].scores[3] is None


def test_curves_follow_the_setting_and_leave_out_joint_training(make):
    runs = [make("keeplora", 0, 80.0 + lr, lr=lr) for lr in (4e-3, 1e-3, 1e-2)]
    joint = make("joint", 0, 90.0)
    joint["metrics"] |= {"bwt": None, "plasticity": None}
    curves = trade_off_curves(group_runs([*runs, joint]))
    assert list(curves) == ["keeplora"]
    assert [setting for setting, _, _ in curves["keeplora"]] == ["lr 0.001", "lr 0.004", "lr 0.01"]


def test_costs_are_relative_to_the_median_of_sequential_lora_and_absent_where_nothing_was_recorded(make):
    def run(strategy, seed, seconds, **changes):
        facts = {"trained_parameters": [10, 1200], "stored_bytes": {"answering": 1_500_000, "learning": 0}, **changes}
        wall = {"gradient": 1.0, "train": seconds - 1.0, "consolidate": 0.0, "evaluate": 2 * seconds}
        return make(strategy, seed, 50.0, wall_seconds=wall, **facts)

    runs = [run("finetune", seed, seconds) for seed, seconds in enumerate((19.0, 900.0, 20.0))]  # one was halted
    runs.append(run("olora", 1, 50.0, trained_parameters=[7]))
    heads, rows = costs(group_runs(runs))
    assert heads[1:] == ["trained parameters", "stored to answer", "stored to go on", "training time", "answering time"]
    assert rows[0][1:] == ["1,200", "1.50 MB", "0.00 MB", "1.00", "1.00"]
    assert rows[1][1:] == ["7", "1.50 MB", "0.00 MB", "2.50", "2.50"]
    assert costs(group_runs(runs[3:]))[1][0][-1] == "–", "no sequential LoRA to compare with"
    assert costs(group_runs([*runs[:3], make("joint", 1, 50.0)])) is None
