"""Which domains a run has, in which order, and which file grades them."""

from __future__ import annotations

import json

import pytest

from mllm_keeplora.config import load_config, parse_config
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.errors import UserError
from tests.support.tiny import tiny_benchmark, tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_tiny_data(tmp_path_factory.mktemp("data"), train=4, test=6)
    for name in ("Alpha", "Beta", "Gamma"):
        rows = json.loads((root / name / "test.json").read_text())
        (root / name / "val.json").write_text(json.dumps([{**row, "type": "look"} for row in rows[:2]]))
    return root


@pytest.fixture
def load(data):
    """Function (**changes) -> the benchmark of a tiny run with two named orders and validation questions."""

    def build(validation=("Alpha", "Beta", "Gamma"), **changes):
        benchmark = tiny_benchmark(data)
        benchmark["orders"] = {"official": ["Alpha", "Beta", "Gamma"], "reversed": ["Gamma", "Beta", "Alpha"]}
        for name in validation:
            benchmark["domains"][name]["validation"] = f"{data}/{name}/val.json"
        values = tiny_config(data / "base", data, data / "out", benchmark=benchmark, **changes)
        return load_benchmark(parse_config(values, "test"))

    return build


@pytest.mark.parametrize(
    ("domains", "order"),
    [
        (None, ["Alpha", "Beta", "Gamma"]),
        ("reversed", ["Gamma", "Beta", "Alpha"]),
        (["Beta", "Alpha"], ["Beta", "Alpha"]),
    ],
)
def test_domains_come_as_listed_by_the_name_of_an_order_or_as_the_benchmark_has_them(load, domains, order):
    assert list(load(domains=domains).domains) == order


def test_an_unknown_order_lists_the_known_ones(load):
    with pytest.raises(UserError, match=r"has no order 'random'; known: official, reversed"):
        load(domains="random")


def test_the_split_says_which_questions_are_graded(load):
    assert len(load().test_records("Beta")) == 6
    validation = load(eval={"split": "validation"})
    assert [record.kind for record in validation.test_records("Beta")] == ["look", "look"]


def test_validation_never_looks_at_a_suite(load):
    assert list(load().suites) == ["general"]
    assert load(eval={"split": "validation"}).suites == {}


def test_a_domain_without_validation_questions_is_refused_by_name(load):
    with pytest.raises(UserError, match="domain Gamma names no validation file"):
        load(validation=("Alpha", "Beta"), eval={"split": "validation"})


def test_the_mini_benchmark_can_be_learnt_in_its_other_order():
    config = load_config("mini_dcl", ["domains=reversed"])
    assert config.domains == "reversed"
