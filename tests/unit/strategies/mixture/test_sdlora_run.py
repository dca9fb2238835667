"""SD-LoRA: its options, and a whole run that loses its memory between any two stages."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.adapters.mixers import load_mixer
from mllm_keeplora.adapters.stored import past_of, updates_of
from mllm_keeplora.checks.run import check_everywhere
from mllm_keeplora.config import StrategyConfig, parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.stages.consolidate import consolidate
from mllm_keeplora.stages.gradient import gradient
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.stages.opening import open_run
from mllm_keeplora.stages.prepare import prepare
from mllm_keeplora.stages.train import train
from mllm_keeplora.strategies import build_strategy
from tests.support.tiny import tiny_config, write_tiny_data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": "official"}, r"^strategy: compat official .* it needs nu one, got norm \("),
        ({"later_ranks": {0: 4}}, "at least 1"),
        ({"later_ranks": {3: 0}}, "at least 1"),
        ({"kd_threshold": 1.5}, "kd_threshold"),
        ({"magnitude": 0.0}, "magnitude"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_strategy(StrategyConfig(name="sdlora", **options))


def test_the_registry_builds_it_with_the_published_numbers():
    strategy = build_strategy(StrategyConfig(name="sdlora"))
    options = strategy.options
    assert (options.rank, options.alpha, options.magnitude, options.kd_threshold) == (10, 10.0, 1.0, None)
    assert strategy.needs == {"parameters"} and strategy.combine == "sum"
    assert build_strategy(StrategyConfig(name="sdlora", preset="official")).options.magnitude == 0.8
    assert build_strategy(StrategyConfig(name="sdlora", preset="kd")).options.kd_threshold == 9e-4


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """Function (folder, stops) -> the run there, learnt stage by stage; at each of `stops` all memory is lost."""
    data = write_tiny_data(tmp_path_factory.mktemp("data"), train=8, test=2)

    def learnt(folder, stops=()):
        strategy = {"name": "sdlora", "rank": 3, "alpha": 6, "kd_threshold": 1.0, "magnitude_rate": 10}
        strategy["later_ranks"] = {1: 2}
        values = tiny_config(tiny_folder, data, folder)
        config = parse_config({**values, "strategy": strategy}, "test")
        checked = check_everywhere(config)
        opened = open_run(config, checked, None, None)
        learner = Learner(config, opened, checked.benchmark, checked.strategy)
        prepare(learner)
        for unit in opened.units:
            for stage in (gradient, train, consolidate):
                stage(learner, unit)
                if (unit.index, stage.__name__) in stops:
                    learner = Learner(config, opened, checked.benchmark, build_strategy(config.strategy))
        return opened, learner

    return learnt


def test_a_run_that_loses_its_memory_between_any_two_stages_ends_the_same(run, tmp_path):
    whole, _ = run(tmp_path / "whole")
    stages = [(index, stage) for index in (1, 2, 3) for stage in ("gradient", "train", "consolidate")]
    broken, learner = run(tmp_path / "broken", stages)
    files = sorted(path.relative_to(whole.path) for path in whole.path.rglob("*.safetensors"))
    assert sum(path.name == "mixer.safetensors" for path in files) == 6 and len(files) > 15
    for path in files:
        assert (whole.path / path).read_bytes() == (broken.path / path).read_bytes(), path
    for number, unit in enumerate(whole.units, start=1):
        final = load_mixer(whole.folder(unit).mixer)
        assert final.scales.any(dim=0).tolist() == [True, False, False][:number]
    trained, final = (load_mixer(path) for path in (whole.folder(unit).trained_mixer, whole.folder(unit).mixer))
    assert trained.magnitudes[2] != 0 and final.magnitudes[2] == 0
    learner.bring_to(3)
    assert [set(factors.weight.values()) == {0.0} for factors in learner.adapters.past] == [False, True, True]
    for layer in learner.adapters.layers:
        summed = sum(factors.delta(layer) for factors in past_of(whole, whole.units).factors)
        assert torch.allclose(sum(each.delta(layer) for each in updates_of(whole, whole.units)), summed, atol=1e-5)
        assert not torch.allclose(updates_of(whole, whole.units)[1].delta(layer), torch.zeros(()), atol=1e-4)
