"""Modules of a user's own that a config names: what they state gets into the registries, what does not fit is told."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pydantic
import pytest
import yaml

from mllm_keeplora.config import find_config, load_config, parse_config, shipped
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.data.readers import read_test
from mllm_keeplora.errors import UserError
from mllm_keeplora.metrics import score
from mllm_keeplora.strategies import STRATEGIES, build_strategy, summary_of
from mllm_keeplora.strategies.baselines.finetune import Finetune
from mllm_keeplora.system.plugins import version_of
from tests.support.plugins import plugin


class Mine(Finetune):
    """Learn as I would.

    At length.
    """


def answers_yes(prediction, answer, question="", image=""):
    return float(prediction == "yes")


def config(**changes):
    base = {"name": "own", "base": {"model": "tiny-llava"}, "benchmark": "mini_dcl", "strategy": {"name": "finetune"}}
    return parse_config({**base, **changes}, origin="own.yaml")


def test_a_strategy_and_a_scorer_are_found_by_name_once_their_module_is_named():
    with plugin("lab", STRATEGIES={"mine": Mine}, SCORERS={"yes": answers_yes}):
        with pytest.raises(UserError, match="'mine' is unknown"):
            build_strategy(config(strategy={"name": "mine"}).strategy)
        for _ in range(2):  # as `check` does before a run
            own = config(strategy={"name": "mine", "rank": 2}, plugins=["lab"])
        assert isinstance(build_strategy(own.strategy), Mine)
        assert summary_of("mine") == "Learn as I would." and summary_of("finetune").startswith("Sequential LoRA")
        assert score("yes", "yes", "no") == 1.0
    assert "mine" not in STRATEGIES


def test_plugins_may_be_named_by_an_override():
    with plugin("lab", STRATEGIES={"mine": Mine}):
        loaded = load_config("mini_dcl", ["plugins=[lab]", "strategy.name=mine", "strategy.rank=2"])
        assert loaded.plugins == ["lab"] and isinstance(build_strategy(loaded.strategy), Mine)


def test_a_benchmark_is_found_by_name_with_its_data_beside_its_file(tmp_path, monkeypatch):
    (tmp_path / "train.json").write_text("[]")
    domains = {"Birds": {"train": "train.json", "test": "test.json", "scorer": "yes"}}
    (tmp_path / "birds.yaml").write_text(yaml.safe_dump({"name": "birds", "domains": domains}))
    with plugin("lab", BENCHMARKS={"birds": tmp_path / "birds.yaml"}, SCORERS={"yes": answers_yes}):
        monkeypatch.setenv("MLLM_KEEPLORA_DATA", "/of/shipped/ones")
        found = load_benchmark(config(benchmark="birds", plugins=["lab"]))
        assert found.has_training("Birds") and found.root == tmp_path
        assert "birds" in shipped("benchmarks") and find_config("benchmarks", "birds") == tmp_path / "birds.yaml"
        moved = load_benchmark(config(benchmark="birds", plugins=["lab"], data_root="/elsewhere"))
        assert moved.root == Path("/elsewhere")
        (tmp_path / "train.json").unlink()
        assert load_benchmark(config(benchmark="birds", plugins=["lab"])).root == Path("/of/shipped/ones")


def rows_of_table(path):
    for line in path.read_text().splitlines():
        number, text, answer = line.split("\t")
        yield {"question_id": number, "text": text, "answer": answer}


def test_a_reader_gives_rows_of_files_of_its_ending(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_keeplora.data.readers.SMALL", 40)
    small, large = tmp_path / "small.tsv", tmp_path / "large.tsv"
    small.write_text("1\twhat ?\tred\n")
    large.write_text("".join(f"{number}\twhat ?\tblue\n" for number in range(9)))
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    with plugin("lab", READERS={".tsv": rows_of_table}):
        config(plugins=["lab"])
        assert [record.answer for record in read_test(small, tmp_path)] == ["red"]
        assert [record.id for record in read_test(large, tmp_path)] == list("012345678")
    with pytest.raises(UserError, match="neither one JSON array"):
        read_test(small, tmp_path)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"STRATEGIES": {"ewc": Mine}}, r"lab\.STRATEGIES has 'ewc', which this package has, too; rename it \(own"),
        ({"SCORERS": {"exact": answers_yes}}, r"lab\.SCORERS has 'exact', which this package has"),
        ({"BENCHMARKS": {"ucit": Path("ucit.yaml")}}, r"lab\.BENCHMARKS has 'ucit', which this package has"),
        ({"READERS": {".json": rows_of_table}}, r"lab\.READERS has '\.json', which this package has"),
        ({"STRATEGIES": [Mine]}, r"lab\.STRATEGIES must be a dictionary, got list"),
        ({"strategies": {"mine": Mine}}, r"lab has none of STRATEGIES, SCORERS, BENCHMARKS, READERS; name a module"),
    ],
)
def test_what_a_plugin_may_not_state(entries, told):
    with plugin("lab", **entries), pytest.raises(UserError, match=told):
        config(plugins=["lab"])


def test_two_plugins_may_not_have_one_name():
    lab, other = {"STRATEGIES": {"mine": Mine}}, {"STRATEGIES": {"mine": Finetune}}
    with plugin("lab", **lab), plugin("other", **other), pytest.raises(UserError, match="'mine', which lab has, too"):
        config(plugins=["lab", "other"])


def test_a_module_that_cannot_be_imported_is_told_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError) as told:
        config(plugins=["no_lab.methods"])
    assert str(told.value) == (
        "plugins: no_lab.methods cannot be imported (No module named 'no_lab'); install it, or put the folder that it "
        "lies in on PYTHONPATH (own.yaml)"
    )
    (tmp_path / "half_a_lab.py").write_text("from torch import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"half_a_lab cannot be imported .*no_such_thing"):
        config(plugins=["half_a_lab"])


@pytest.mark.parametrize("given", ["lab/methods.py", "my-lab", "", 3, "lab..x"])
def test_a_plugin_is_the_name_of_a_module(given):
    with pytest.raises(UserError, match=r"plugins\.0: .*own\.yaml"):
        config(plugins=[given])


def test_a_run_without_plugins_records_none_and_no_result_hangs_on_the_key():
    assert "plugins" not in config().resolved()
    with plugin("lab", SCORERS={}):
        own = config(plugins=["lab"])
        assert own.resolved()["plugins"] == ["lab"] and "plugins" not in own.result_defining()


def test_the_version_of_a_plugin_changes_with_any_file_of_its_package(tmp_path, monkeypatch):
    folder = tmp_path / "versioned_lab"
    folder.mkdir()
    for name in ("__init__.py", "methods.py", "helpers.py"):
        (folder / name).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import_module("versioned_lab.methods")
    before = version_of("versioned_lab.methods")
    assert re.fullmatch("sha256:[0-9a-f]{16}", before) and version_of("versioned_lab.methods") == before
    (folder / "helpers.py").write_text("# changed")
    assert version_of("versioned_lab.methods") != before
    assert re.fullmatch(f"{re.escape(pydantic.VERSION)} sha256:[0-9a-f]{{16}}", version_of("pydantic.main"))
