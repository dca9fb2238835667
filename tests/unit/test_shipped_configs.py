"""Every YAML and JSON that is shipped can be loaded, and says what the code understands."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from mllm_keeplora.config import load_config, read_yaml, shipped
from mllm_keeplora.data.loading import GENERATORS, _definition, _wanted
from mllm_keeplora.errors import UserError
from mllm_keeplora.metrics import SCORERS, UNGRADED
from mllm_keeplora.models.base import FAMILIES
from mllm_keeplora.models.causal.templates import STYLES
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.sweeps.plan import final_cell, load_sweep, tune_cell
from mllm_keeplora.training.deepspeed import deepspeed_file

CONFIGS = Path(str(resources.files("mllm_keeplora.configs")))
RUNS, MODELS, BENCHMARKS, SWEEPS = (shipped(kind) for kind in ("runs", "models", "benchmarks", "sweeps"))
CLASSES = sorted((CONFIGS / "benchmarks").rglob("*.json"))
ZERO = sorted(path.stem for path in (CONFIGS / "deepspeed").glob("*.json"))


def test_every_file_of_the_folder_is_seen_here():
    files = {path for path in CONFIGS.rglob("*") if path.suffix in {".yaml", ".yml", ".json"}}
    assert len(files) == len(RUNS) + len(MODELS) + len(BENCHMARKS) + len(CLASSES) + len(SWEEPS) + len(ZERO)
    assert RUNS and MODELS and BENCHMARKS and SWEEPS
    assert {"zero1", "zero2", "zero3", "zero3_offload"} <= set(ZERO)


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_names_what_exists(name):
    config = load_config(name)
    assert config.name == name
    assert build_strategy(config.strategy).options.rank >= 1
    assert config.base.model in MODELS
    benchmark, _ = _definition(config)
    assert set(_wanted(config, benchmark)) <= set(benchmark.domains)
    assert set(config.per_domain) <= set(benchmark.domains)
    deepspeed_file(config.deepspeed)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_says_where_it_is(name):
    settings = read_yaml(CONFIGS / "models" / f"{name}.yaml")
    assert isinstance(settings["path"], str)
    assert settings.keys() <= {"path", "prompt", "architecture", "family", "made_by"}
    assert settings.get("family", "causal") in FAMILIES
    assert settings.get("prompt") in ({"chat_template", *STYLES} if "family" not in settings else {None})
    if settings["path"].startswith("package:"):
        folder = Path(str(resources.files("mllm_keeplora"))) / settings["path"].removeprefix("package:")
        assert (folder / "config.json").is_file()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_shipped_benchmark_has_domains_and_known_scorers(name):
    config = load_config("mini_dcl", [f"benchmark={name}"])
    benchmark, _ = _definition(config)
    assert benchmark.name == name
    assert len(benchmark.domains) >= 2
    assert benchmark.generator is None or benchmark.generator in GENERATORS
    for part in [*benchmark.domains.values(), *benchmark.suites.values()]:
        assert part.scorer in SCORERS or part.scorer in UNGRADED


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_order_of_a_shipped_benchmark_holds_each_domain_once(name):
    benchmark, _ = _definition(load_config("mini_dcl", [f"benchmark={name}"]))
    for named, order in benchmark.orders.items():
        left_out = {"without_space": ["Space"]}.get(named, [])  # whose clips need a licence of their own
        assert sorted([*order, *left_out]) == sorted(benchmark.domains)


def test_the_mini_benchmark_has_two_orders_that_differ():
    benchmark, _ = _definition(load_config("mini_dcl"))
    official, other = benchmark.orders.values()
    assert official == list(benchmark.domains) != other


@pytest.mark.parametrize("name", SWEEPS)
def test_a_shipped_sweep_grades_tuning_on_validation_and_the_choice_on_test_questions(name):
    sweep = load_sweep(name)
    assert sweep.name == name
    for label in sweep.strategies:
        value = sweep.tune.grid[-1]
        tuned = tune_cell(sweep, label, value).config()
        final = final_cell(sweep, label, value, sweep.final.seeds[0]).config()
        assert (tuned.eval.split, final.eval.split) == ("validation", "test")
        assert tuned.seed not in sweep.final.seeds
        section, key = sweep.tune.key.split(".")
        for config in (tuned, final):
            assert config.model_dump()[section][key] == value
        assert build_strategy(final.strategy).options.rank >= 1


@pytest.mark.parametrize("name", ZERO)
def test_a_shipped_deepspeed_setting_leaves_the_batch_to_the_run(name):
    settings = json.loads(Path(deepspeed_file(name)).read_text())
    assert settings["zero_optimization"]["stage"] == int(name.removeprefix("zero")[0])
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
    assert "fp16" not in settings or settings["fp16"]["enabled"] is False


def test_an_own_deepspeed_file_is_taken_by_its_path(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    assert deepspeed_file(str(tmp_path / "mine.json")) == str(tmp_path / "mine.json")
    assert deepspeed_file(None) is None
    with pytest.raises(UserError, match="zero1, zero2, zero3, zero3_offload"):
        deepspeed_file("zero4")
