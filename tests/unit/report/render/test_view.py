import pytest

from mllm_keeplora.report.render import view


def test_the_sheet_puts_reference_rows_on_top_and_suites_to_the_right(results):
    sheet = view.score_sheet(results)
    assert sheet.columns == ("RS", "Med", "AD", "Sci", "Fin", "general")
    assert [row.label for row in sheet.references] == ["zero-shot", "blind"]
    assert sheet.references[0].scores == (39.1, 40.2, 39.7, 15.4, 30.3, 82.4)
    assert sheet.references[1].scores[-1] is None
    assert [row.scores[-1] for row in sheet.stages] == [81.0, 80.2, 79.9, 79.1, 78.6]
    assert sheet.stages[1].label == "after Med"


def test_cells_know_whether_their_domain_was_learned(results):
    row = view.score_sheet(results).stages[1]
    assert [row.phase(j, 5) for j in range(6)] == ["seen", "learned", "unseen", "unseen", "unseen", "general"]


def test_a_reference_row_without_a_score_is_left_out(results):
    results |= {"zero_shot": [None] * 5, "blind": None, "general": {}}
    sheet = view.score_sheet(results)
    assert sheet.references == () and sheet.suites == ()


def test_a_general_series_that_stops_early_leaves_the_rest_unmeasured(results):
    results["general"] = {"general": [82.4, 81.0]}
    assert [row.scores[-1] for row in view.score_sheet(results).stages] == [81.0, None, None, None, None]


def test_the_only_row_of_joint_training_is_not_named_after_one_domain(results):
    results["score_matrix"][:4] = [[None] * 5] * 4
    results["general"] = {"general": [82.4, 78.6]}
    stages = view.score_sheet(results).stages
    assert stages[-1].label == "after all"
    assert {stages[-1].phase(column, 3) for column in range(3)} == {"learned"}
    assert [row.scores[-1] for row in stages] == [None, None, None, None, 78.6]
    assert [row.is_measured for row in stages] == [False, False, False, False, True]


def test_nan_counts_as_not_measured(results):
    results["score_matrix"][0][4] = float("nan")
    assert view.score_sheet(results).stages[0].scores[4] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_matrix": [[1.0] * 5] * 4}, r"one row per domain \(5\), got 4"),
        ({"score_matrix": [[1.0] * 6] * 5}, "score_matrix row holds 6"),
        ({"zero_shot": [1.0] * 6}, "zero_shot holds 6"),
        ({"general": {"mme": [1.0] * 7}}, "general series 'mme' holds 7"),
    ],
)
def test_scores_that_do_not_fit_the_domains_are_refused(results, change, message):
    with pytest.raises(ValueError, match=message):
        view.score_sheet(results | change)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (192.4, "3 min 12 s"),
        (3600, "1 h 00 min"),
        (7530, "2 h 06 min"),
    ],
)
def test_durations_read_naturally(seconds, text):
    assert view.duration_text(seconds) == text


def test_memory_and_scores_read_naturally():
    assert (view.memory_text(300 * 2**20), view.memory_text(1.5 * 2**30)) == ("300 MiB", "1.5 GiB")
    assert [view.score_text(63.24), view.score_text(None), view.score_text(2.0, signed=True)] == ["63.2", "–", "+2.0"]


def test_retention_is_a_ratio_shown_in_percent():
    metrics = {metric.key: metric for metric in view.METRICS}
    assert view.metric_text(metrics["general_retention"], 0.9539) == "95.4 %"
    assert view.metric_text(metrics["general_retention"], None) == "–"
    assert view.metric_text(metrics["bwt"], 1.0) == "+1.0"
