"""The schema of a run: reading, overriding, refusing, comparing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm_keeplora.config import as_yaml, flatten, load_config, parse_config, read_yaml, shipped
from mllm_keeplora.errors import UserError, known, several

LEAST = {"name": "x", "base": {"model": "b"}, "benchmark": "m", "strategy": {"name": "keeplora"}}


def refusal(**changes) -> str:
    with pytest.raises(UserError) as caught:
        parse_config({**LEAST, **changes}, origin="here.yaml")
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_the_least_config_has_a_default_for_every_other_key():
    config = parse_config(LEAST, origin="test")
    assert config.output_dir == Path("runs/x")
    assert (config.train.batch_size, config.eval.domains, config.deepspeed) == (64, "seen", None)


def test_missing_keys_are_named_all_at_once():
    with pytest.raises(UserError) as caught:
        parse_config({"base": {}}, origin="here.yaml")
    message = str(caught.value)
    for key in ("name", "base.model", "benchmark", "strategy"):
        assert f"- {key} is missing (here.yaml)" in message
    assert message.startswith("4 faults:")


def test_an_unknown_key_is_named_with_its_value_and_origin():
    assert refusal(train={"lrr": 3}) == "train.lrr is not a known key, got 3; did you mean lr? (here.yaml)"
    message = refusal(adapters={"rate": 3})
    assert message == (
        "adapters.rate is not a known key, got 3; known: dropout, history, projector, target (here.yaml)"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.lr", 0),
        ("train.batch_size", 0),
        ("train.warmup_ratio", 1.5),
        ("adapters.dropout", 1.0),
        ("eval.limit", 0),
        ("seed", -1),
        ("threads", 0),
        ("name", "a/b"),
        ("name", ""),
    ],
)
def test_a_number_or_name_out_of_range_is_refused_with_its_value(key, value):
    section, _, name = key.rpartition(".")
    message = refusal(**({section: {name: value}} if section else {name: value}))
    assert key in message
    assert f"got {value!r} (here.yaml)" in message


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path):
    (tmp_path / "run.yaml").write_text("name: x\ntrain: {lr: 0.1}\nseed: 1\ntrain: {epochs: 2}\n")
    with pytest.raises(UserError, match=r"run.yaml is not readable YAML: train stands there twice, .*line 2"):
        load_config(tmp_path / "run.yaml")


def test_settings_of_one_domain_go_on_top_of_the_common_ones():
    changes = {"train": {"lr": 0.1, "epochs": 2}, "per_domain": {"Med": {"train": {"epochs": 3}}}}
    config = parse_config({**LEAST, **changes}, origin="test")
    assert (config.train_of("Med").lr, config.train_of("Med").epochs) == (0.1, 3)
    assert config.train_of("RS") == config.train


def test_wrong_settings_of_domains_are_named_all_at_once():
    message = refusal(per_domain={"A": {"train": {"lr": -1}}, "B": {"train": {"x": 1}}})
    assert "per_domain.A.train.lr" in message
    assert "per_domain.B.train.x is not a known key" in message


def test_options_of_the_strategy_are_kept_for_the_strategy():
    config = parse_config({**LEAST, "strategy": {"name": "keeplora", "rank": 3, "own": [1]}}, origin="test")
    assert config.strategy.options == {"rank": 3, "own": [1]}


# -- files and overrides -----------------------------------------------------------------------------------------


def test_overrides_reach_into_sections_and_read_numbers(tmp_path):
    path = written(tmp_path, "name: x\nbase: {model: b}\nbenchmark: m\nstrategy: {name: keeplora}\n")
    overrides = ["train.lr=1e-3", "per_domain.Med.train.epochs=2", "domains=[A, B]", "eval.limit=null", "name=y=z"]
    with pytest.raises(UserError, match="name"):
        load_config(path, overrides)
    config = load_config(path, overrides[:-1])
    assert config.train.lr == 1e-3
    assert config.per_domain["Med"].train == {"epochs": 2}
    assert config.domains == ["A", "B"]
    assert config.eval.limit is None


def test_exponents_without_a_point_are_numbers_wherever_they_stand(tmp_path):
    text = "name: 1e5_steps\nbase: {model: b}\nbenchmark: m\nstrategy: {name: keeplora}\n"
    path = written(tmp_path, text + "train: {args: {adam_epsilon: 1e-6, adam_beta1: .9, note: e-6}}\n")
    config = load_config(path)
    assert config.train.args == {"adam_epsilon": 1e-6, "adam_beta1": 0.9, "note": "e-6"} and config.name == "1e5_steps"
    assert load_config(path, ["train.args={adam_epsilon: 1e-8}"]).train.args == {"adam_epsilon": 1e-8}


def test_what_is_written_is_read_as_the_same(tmp_path):
    values = {"name": "1e5", "rate": 1e-6, "small": 1e-05, "note": "e-6", "version": "1.0", "on": "yes", "umlaut": "ä"}
    path = tmp_path / "some.yaml"
    path.write_text(as_yaml(values), encoding="utf-8")
    assert read_yaml(path) == values


def test_the_last_of_two_overrides_wins(tmp_path):
    path = written(tmp_path, "name: x\nbase: {model: b}\nbenchmark: m\nstrategy: {name: keeplora}\n")
    assert load_config(path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["train.lr", "=3", "name.x=1", "seed={a: "])
def test_an_override_that_cannot_be_read_is_refused(override, tmp_path):
    path = written(tmp_path, "name: x\nbase: {model: b}\nbenchmark: m\nstrategy: {name: keeplora}\n")
    with pytest.raises(UserError, match="override"):
        load_config(path, [override])


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "plain words"])
def test_a_file_that_holds_no_keys_is_refused_by_its_name(text, tmp_path):
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(written(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable YAML"):
        load_config(tmp_path / "run.yaml")


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(UserError, match="mini_dcl"):
        load_config("maxi_dcl")
    assert "mini_dcl" in shipped("runs")


# -- what defines results ----------------------------------------------------------------------------------------


def test_runtime_keys_do_not_define_results():
    defining = parse_config(LEAST, origin="test").result_defining()
    runtime = {"output", "threads", "deepspeed", "data_root", "eval.batch_size", "train.workers", "train.log_steps"}
    runtime |= {"train.micro_batch_size", "train.gradient_checkpointing", "train.checkpoint_steps"}
    assert not runtime & defining.keys()
    assert {"seed", "train.lr", "train.batch_size", "base.dtype", "eval.limit", "strategy.name"} <= defining.keys()


def test_a_runtime_change_leaves_what_defines_results_alone():
    before = parse_config(LEAST, origin="test").result_defining()
    changed = {"threads": 3, "output": "o", "deepspeed": "zero2", "eval": {"batch_size": 3}, "train": {"workers": 2}}
    assert parse_config({**LEAST, **changed}, origin="test").result_defining() == before
    assert parse_config({**LEAST, "seed": 1}, origin="test").result_defining() != before


def test_training_settings_of_a_domain_are_compared_without_runtime_keys():
    defining = parse_config(LEAST, origin="test").train.result_defining()
    assert "lr" in defining and "workers" not in defining


def test_the_resolved_config_reads_back_as_itself():
    config = parse_config({**LEAST, "strategy": {"name": "keeplora", "rank": 3}}, origin="test")
    assert parse_config(config.resolved(), origin="test") == config


def test_flatten_gives_dotted_names_and_keeps_empty_dictionaries():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


# -- errors ------------------------------------------------------------------------------------------------------


def test_many_faults_are_shown_up_to_a_limit():
    assert str(several(["one"])) == "one"
    assert str(several(["one", "two"])) == "2 faults:\n  - one\n  - two"
    lines = str(several([str(number) for number in range(25)])).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  - ... and 5 more"


def test_known_names_are_sorted_and_none_is_said():
    assert known({"b": 1, "a": 2}) == "a, b"
    assert known([]) == "none"


# -- what is let in ----------------------------------------------------------------------------------------------


def float_keys() -> list[str]:
    """Every float key of the schema, by its dotted name."""
    from mllm_keeplora.config import RunConfig

    found = []
    for key, field in RunConfig.model_fields.items():
        inside = getattr(field.annotation, "model_fields", {})
        found += [f"{key}.{name}" for name, each in inside.items() if "float" in str(each.annotation)]
    return found


def test_there_are_float_keys():
    assert {"train.lr", "adapters.dropout", "train.epochs"} <= set(float_keys()) and len(float_keys()) >= 7


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "inf", "nan", "1e999"])
@pytest.mark.parametrize("key", float_keys())
def test_a_number_that_is_not_finite_is_refused(key, value):
    section, name = key.split(".")
    assert f"{key}: input should be" in refusal(**{section: {name: value}})


@pytest.mark.parametrize("value", [float("inf"), "nan"])
def test_options_of_every_strategy_are_finite(value):
    from mllm_keeplora.config import StrategyConfig
    from mllm_keeplora.strategies import STRATEGIES, build_strategy

    seen = 0
    for name, strategy in STRATEGIES.items():
        for key, field in strategy.Options.model_fields.items():
            if "float" in str(field.annotation):
                seen += 1
                with pytest.raises(UserError, match=f"strategy.{key}"):
                    build_strategy(StrategyConfig(name=name, **{key: value}))
    assert seen > 20


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "a" * 101), ("output", "a" * 256), ("output", "a/" * 2001), ("output", "a\nb"), ("data_root", "\x1b[2J"),
     ("deepspeed", "é" * 128), ("output", "a\0b")],
)  # fmt: skip
def test_a_name_that_no_file_system_takes_is_refused_shortly(key, value):
    told = refusal(**{key: value})
    assert told.startswith(key) and len(told) < 500


def test_a_value_of_many_letters_is_told_by_its_begin():
    assert len(refusal(seed="x" * 100_000)) < 500 and len(refusal(**{"y" * 100_000: 1})) < 1000


def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")
