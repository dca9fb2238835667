"""Published rows of shipped benchmarks agree with themselves, and stand below the run's own."""

import pytest

from mllm_keeplora.config import find_config, read_yaml, shipped
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.published import published_table

WITH_ROWS = [name for name in shipped("benchmarks") if read_yaml(find_config("benchmarks", name)).get("published")]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_name_every_domain_and_their_mean_is_the_mean(name):
    values = read_yaml(find_config("benchmarks", name))
    for row in values["published"]:
        assert set(row["scores"]) == set(values["domains"]) and row["source"]
        mean = sum(row["scores"].values()) / len(row["scores"])
        assert mean == pytest.approx(row["mfn"], abs=0.03), row["method"]
        if "bwt" in row:  # BWT = T / (T - 1) (MFN - MFT)
            count = len(row["scores"])
            assert count / (count - 1) * (row["mfn"] - row["mft"]) == pytest.approx(row["bwt"], abs=0.03), row["method"]


def results_of(benchmark, domains):
    size = len(domains)
    matrix = [[None] * size for _ in domains[:-1]] + [[50.0] * (size - 1) + [None]]
    empty = [None] * size
    return Results(benchmark, domains, "keeplora", "b", 0, matrix, empty, empty, {}, {"mfn": 50.0, "bwt": -1.25}, {}, 0)


def test_the_runs_own_row_stands_first_and_what_is_not_measured_is_no_zero():
    heads, rows = published_table(results_of("mllm_dcl", ["RS", "Med", "AD", "Sci", "Fin"]))
    assert heads == ["", "RS", "Med", "AD", "Sci", "Fin", "MFN", "MFT", "MAA", "BWT", "source"]
    assert rows[0] == ["this run", "50.0", "50.0", "50.0", "50.0", "–", "50.0", "–", "–", "-1.2", ""]
    assert rows[2][:4] == ["LoRA-FT", "69.7", "41.6", "25.4"]


def test_a_benchmark_of_ones_own_has_no_published_rows():
    assert published_table(results_of("own", ["A", "B"])) is None
    assert published_table(results_of("mini_dcl", ["RS", "Med"])) is None
