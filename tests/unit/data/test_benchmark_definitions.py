"""What a benchmark says and what a run may change of it: epochs, defaults by `from`, names, data that is not there."""

import pytest

from mllm_keeplora.config import load_config, parse_config
from mllm_keeplora.data import load_benchmark, with_published_epochs
from mllm_keeplora.errors import UserError
from tests.support.miniatures import MINIATURES


@pytest.fixture
def dcl(tmp_path):
    MINIATURES["mllm_dcl"](tmp_path)

    def load(*overrides):
        config = load_config("mllm_dcl_llava15", [f"data_root={tmp_path}", *overrides])
        return with_published_epochs(config, load_benchmark(config)), config

    return load


def epochs(config):
    return [config.train_of(name).epochs for name in ("RS", "Med", "AD", "Sci", "Fin")]


def test_epochs_are_the_domains_own_else_the_runs_else_the_published_ones_else_one(dcl):
    assert epochs(dcl()[0]) == [1, 3, 1, 2, 1]
    assert epochs(dcl("train.epochs=2")[0]) == [2, 2, 2, 2, 2]
    assert epochs(dcl("per_domain={Med: {train: {epochs: 5}}}")[0]) == [1, 5, 1, 2, 1]
    own, _ = dcl("benchmark={A: {train: RS/train.json, test: RS/test.json}}")
    assert own.train_of("A").epochs == 1.0


def test_a_runs_stored_config_leaves_open_what_was_left_open(dcl):
    _, config = dcl()
    again = parse_config(config.resolved(), origin="stored")
    assert epochs(with_published_epochs(again, load_benchmark(again))) == [1, 3, 1, 2, 1]


def test_defaults_of_domains_alone_do_not_reach_suites(dcl):
    files = "domains: {A: {train: RS/train.json, test: RS/test.json}}, suites: {general: {test: RS/test.json}}"
    config = dcl(f"benchmark={{name: own, defaults: {{epochs: 2, scorer: exact}}, {files}}}")[1]
    benchmark = load_benchmark(config)
    assert benchmark.domains["A"].epochs == 2
    assert {part.scorer for part in (benchmark.domains["A"], benchmark.suites["general"])} == {"exact"}


def test_a_run_may_take_a_benchmark_with_other_defaults(tmp_path):
    MINIATURES["ucit"](tmp_path)
    overrides = [f"data_root={tmp_path}"]
    published = load_benchmark(load_config("ucit_llava15", overrides))
    other = load_benchmark(load_config("ucit_llava15_mcitlib", overrides))
    assert {part.image_mode for part in published.domains.values()} == {"pad"}
    assert {(part.image_mode, part.max_new_tokens) for part in other.domains.values()} == {("processor", 256)}
    assert list(published.domains) == list(other.domains)
    assert published.train_records("IconQA")[0].media[0].pad and published.test_records("IconQA")[0].media[0].pad
    assert other.train_records("IconQA")[0].media[0].pad and not other.test_records("IconQA")[0].media[0].pad
    one = ["benchmark={from: ucit, domains: {IconQA: {scorer: exact}}}", *overrides]
    assert load_benchmark(load_config("ucit_llava15", one)).domains["IconQA"].scorer == "exact"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark={from: ucit, orders: {x: []}}", "beside `from` only defaults and domains may stand"),
        ("benchmark={from: ucit, domains: {Icon: {scorer: exact}}}", "benchmark.domains.Icon: ucit has"),
        ("benchmark={from: nowhere}", "nowhere"),
        ("benchmark={../../x: {train: a.json, test: b.json}}", "cannot name a domain"),
        ("benchmark={OCR/VQA: {train: a.json, test: b.json}}", "cannot name a domain"),
        ("eval.split=validation", "names no validation file"),
    ],
)
def test_what_a_benchmark_may_not_be_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_benchmark(load_config("ucit_llava15", [override, "data_root=."]))


def test_a_shipped_benchmark_without_data_says_what_is_needed(monkeypatch):
    monkeypatch.delenv("MLLM_KEEPLORA_DATA", raising=False)
    with pytest.raises(
        UserError, match="mllm_dcl needs its data: data_root, or MLLM_KEEPLORA_DATA, must be the folder of RS"
    ):
        load_benchmark(load_config("mllm_dcl_llava15"))
