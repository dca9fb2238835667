import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_keeplora.metrics import ScoreMatrix, general_retention
from tests.oracles import score_matrix as oracle

BASE = [20, 30, 40]
STAGES = [[70, 32, 38], [74, 60, 42], [65, 54, 90]]
ALONE = [70, 66, 93]
EXPECTED = {
    "last": 69.6667,
    "average": 58.3333,
    "transfer": 36.0,
    "mft": 73.3333,
    "mfn": 69.6667,
    "maa": 68.8889,
    "bwt": -5.5,
    "forgetting": 7.5,
    "plasticity": 73.3333,
    "ap": 69.6667,
    "ft": 7.5,
    "fwt": 2.0,
    "fwt_alone": -3.0,
}
NEED_UPPER_TRIANGLE = {"average", "transfer", "fwt"}
UCIT = [
    [90.97],
    [90.38, 92.60],
    [73.90, 86.33, 59.54],
    [75.67, 68.77, 47.34, 53.30],
    [75.10, 74.53, 46.73, 52.30, 69.73],
    [65.77, 71.27, 45.05, 51.20, 49.60, 57.47],
]


def lower_triangle(rows):
    return [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(rows)]


def test_the_worked_example_gives_every_metric():
    metrics = ScoreMatrix(STAGES, zero_shot=BASE, alone=ALONE).metrics()
    assert metrics == {name: pytest.approx(value, abs=5e-5) for name, value in EXPECTED.items()}


def test_cutting_the_worked_example_gives_the_metrics_of_that_moment():
    metrics = ScoreMatrix(STAGES, BASE, ALONE).after(2).metrics()
    assert metrics["ap"] == 67.0
    assert metrics["ft"] == -4.0
    with pytest.raises(ValueError, match=r"1\.\.3, got 4"):
        ScoreMatrix(STAGES).after(4)


def test_the_lower_triangle_is_enough_for_all_metrics_of_seen_domains():
    full = ScoreMatrix(STAGES, BASE, ALONE).metrics()
    lower = ScoreMatrix(lower_triangle(STAGES), BASE, ALONE).metrics()
    assert len(full) == 13
    for name in full:
        assert lower[name] == (None if name in NEED_UPPER_TRIANGLE else full[name])


def test_a_published_ucit_run_is_reproduced():
    rows = [row + [None] * (6 - len(row)) for row in UCIT]
    metrics = ScoreMatrix(rows).metrics()
    expected = {"mft": 70.6017, "mfn": 56.7267, "maa": 72.8986, "bwt": -16.65, "forgetting": 16.65}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=5e-5)


# ZSCL (arXiv 2303.06628), tables of MTIL in both orders, computed from the matrices that its authors publish.
MTIL = {
    "ZSCL order1": {"transfer": 68.1, "average": 75.4, "last": 83.6},
    "ZSCL order2": {"transfer": 64.2, "average": 74.5, "last": 83.4},
    "Continual-FT order1": {"transfer": 44.6, "average": 55.9, "last": 77.3},
    "Continual-FT order2": {"transfer": 46.6, "average": 56.2, "last": 67.4},
}


@pytest.mark.parametrize("run", MTIL)
def test_published_runs_of_mtil_are_reproduced(run):
    path = Path(__file__).parents[2] / "fixtures" / "mtil_zscl.json"
    metrics = ScoreMatrix(json.loads(path.read_text())["matrices"][run]).metrics()
    assert {name: round(metrics[name], 1) for name in MTIL[run]} == MTIL[run]


def test_joint_training_measures_the_last_row_only():
    metrics = ScoreMatrix([[None] * 3, [None] * 3, STAGES[2]], BASE).metrics()
    measured = {name for name, value in metrics.items() if value is not None}
    assert measured == {"last", "mfn", "ap"}


def test_a_single_domain_has_no_backward_forward_or_transfer_value():
    metrics = ScoreMatrix([[50.0]], [10.0], [60.0]).metrics()
    assert {name for name, value in metrics.items() if value is None} == {"transfer", "bwt", "forgetting", "ft", "fwt"}
    assert metrics["last"] == metrics["average"] == metrics["maa"] == 50.0


def test_a_missing_cell_is_never_counted_as_zero():
    rows = lower_triangle(STAGES)
    rows[1][0] = float("nan")
    metrics = ScoreMatrix(rows).metrics()
    assert metrics["maa"] is None and metrics["forgetting"] is None
    assert metrics["bwt"] == -5.5


def test_forgetting_compares_with_the_best_earlier_score_not_with_the_first():
    metrics = ScoreMatrix([[70, 0, 0], [80, 60, 0], [60, 60, 1]]).metrics()
    assert (metrics["forgetting"], -metrics["bwt"]) == (10.0, 5.0)


def test_a_score_from_before_learning_is_not_forgotten():
    metrics = ScoreMatrix([[70, 90, 0], [70, 60, 0], [70, 50, 1]]).metrics()
    assert metrics["forgetting"] == metrics["ft"] == 5.0


def test_metrics_survive_strict_json():
    metrics = ScoreMatrix([[None, None], [1, 2]]).metrics()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


CELL = st.one_of(st.none(), st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))


def square(cell):
    return st.integers(1, 6).flatmap(lambda t: st.lists(st.lists(cell, min_size=t, max_size=t), min_size=t, max_size=t))


@given(square(st.floats(0, 100)).filter(lambda rows: len(rows) > 1))
def test_bwt_is_the_scaled_difference_of_mfn_and_mft(rows):
    t = len(rows)
    metrics = ScoreMatrix(lower_triangle(rows)).metrics()
    assert metrics["bwt"] == pytest.approx(t / (t - 1) * (metrics["mfn"] - metrics["mft"]), abs=1e-9)
    assert metrics["forgetting"] >= -metrics["bwt"] - 1e-9


@given(square(CELL), st.data())
def test_every_metric_equals_the_loops_of_the_oracle(rows, data):
    t = len(rows)
    base, alone = (data.draw(st.lists(CELL, min_size=t, max_size=t)) for _ in range(2))
    expected = {
        name: getattr(oracle, name)(rows) for name in ("last", "average", "transfer", "mft", "mfn", "maa", "bwt")
    }
    expected |= {"plasticity": oracle.mft(rows), "forgetting": oracle.forgetting(rows)}
    expected |= {"ap": oracle.ap(rows, t), "ft": oracle.ft(rows, t)}
    expected |= {"fwt": oracle.fwt(rows, base), "fwt_alone": oracle.fwt_alone(rows, alone)}
    metrics = ScoreMatrix(rows, base, alone).metrics()
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [[1, 2]]}, r"\(T, T\).*\(1, 2\)"),
        ({"rows": []}, r"\(T, T\)"),
        ({"rows": [[1, 2], [3]]}, "regular grid"),
        ({"rows": [["high"]]}, "numbers or None"),
        ({"rows": [[np.inf]]}, "finite"),
        ({"rows": [[1]], "zero_shot": [1, 2]}, r"zero_shot must hold one score per domain \(1\)"),
        ({"rows": [[1]], "alone": []}, "alone must hold"),
    ],
)
def test_a_malformed_matrix_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreMatrix(**arguments)


@pytest.mark.parametrize(
    ("series", "expected"),
    [([80, 70, 60], 0.75), ([50, None, 55], 1.1), ([80], None), ([], None), ([0, 1], None), ([80, None], None)],
)
def test_general_retention_is_final_over_initial(series, expected):
    assert general_retention(series) == (None if expected is None else pytest.approx(expected))


def test_metrics_import_neither_torch_nor_any_other_heavy_library():
    heavy = {"torch", "transformers", "matplotlib", "pydantic"}
    code = f"import sys, mllm_keeplora.metrics; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
