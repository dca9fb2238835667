"""Published rows of shipped benchmarks agree with themselves, and stand below the run's own."""

import dataclasses

import pytest

from mllm_keeplora.config import find_config, read_yaml, shipped
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.published import published_table

WITH_ROWS = [name for name in shipped("benchmarks") if read_yaml(find_config("benchmarks", name)).get("published")]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_name_every_domain_and_their_mean_is_the_mean(name):
    values = read_yaml(find_config("benchmarks", name))
    assert all(row["source"] for row in values["published"])
    for row in (row for row in values["published"] if "mfn" in row):
        assert set(row["scores"]) == set(values.get("orders", {}).get(row.get("order"), values["domains"]))
        mean = sum(row["scores"].values()) / len(row["scores"])
        assert mean == pytest.approx(row["mfn"], abs=0.03), row["method"]
        if "bwt" in row:  # BWT = T / (T - 1) (MFN - MFT)
            count = len(row["scores"])
            assert count / (count - 1) * (row["mfn"] - row["mft"]) == pytest.approx(row["bwt"], abs=0.03), row["method"]


MTIL = [
    name for name in WITH_ROWS if any("last" in row for row in read_yaml(find_config("benchmarks", name))["published"])
]


def test_every_row_is_held_to_one_of_the_two_rules():
    assert MTIL == ["mtil", "mtil_coop"]
    for name in set(WITH_ROWS) - set(MTIL):
        assert all("mfn" in row for row in read_yaml(find_config("benchmarks", name))["published"])


@pytest.mark.parametrize("name", MTIL)
def test_rows_of_a_domain_each_have_the_mean_that_is_told_of_the_whole(name):
    values = read_yaml(find_config("benchmarks", name))
    rows = values["published"]
    whole = {(row["method"], row["order"]): row for row in rows if "transfer" in row}
    for row in rows:
        kind, told = row.get("of", "last"), whole[row["method"], row["order"]]
        first = values["orders"][row["order"]][0]
        if row["scores"]:  # each is rounded to 0.1, and so is the mean
            assert set(row["scores"]) == set(values["domains"]) - ({first} if kind == "transfer" else set())
            assert sum(row["scores"].values()) / len(row["scores"]) == pytest.approx(told[kind], abs=0.11), row


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


def test_rows_are_those_of_the_runs_order_and_means_of_columns_stand_above_those_of_others():
    order = read_yaml(find_config("benchmarks", "mtil"))["orders"]["order2"]
    matrix = [[float(row + column) for column in range(11)] for row in range(11)]
    empty = [None] * 11
    run = Results("mtil", order, "keeplora", "b", 0, matrix, empty, empty, {}, {"transfer": 7.5, "last": 15.0}, {}, 0)
    heads, rows = published_table(run)
    assert heads[-4:] == ["Transfer", "Average", "Last", "source"] and heads[1] == "StanfordCars"
    assert rows[0][:3] == ["this run", "10.0", "11.0"] and rows[0][-4:] == ["7.5", "–", "15.0", ""]
    assert [row[0] for row in rows if row[0].endswith("Transfer")] == []  # nobody publishes these in order 2
    _, rows = published_table(
        dataclasses.replace(run, domains=list(read_yaml(find_config("benchmarks", "mtil"))["domains"]))
    )
    own = next(row for row in rows if row[0] == "this run, Transfer")
    assert own[1:4] == ["–", "1.0", "2.5"] and next(row for row in rows if row[0] == "this run, Average")[1] == "5.0"
    assert next(row for row in rows if row[0] == "ZSCL, Transfer")[1:3] == ["–", "86.0"]
    assert published_table(dataclasses.replace(run, domains=order[::-1])) is None


def test_a_benchmark_of_ones_own_has_no_published_rows():
    assert published_table(results_of("own", ["A", "B"])) is None
    assert published_table(results_of("mini_dcl", ["RS", "Med"])) is None
