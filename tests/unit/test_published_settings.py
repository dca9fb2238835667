"""Shipped runs of public benchmarks have the settings of the published files, as a literal table."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm_keeplora import load_config
from mllm_keeplora.config import StrategyConfig, shipped
from mllm_keeplora.data import load_benchmark, with_published_epochs
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.system import files
from mllm_keeplora.training.deepspeed import deepspeed_file

# run -> rank, alpha, rate, records of a step, longest norm of gradients (0: not clipped), how training pictures and
# questions are put. KeepLoRA's own repository (a17f9c2), MCITlib v3 (4a02727), CoIN's LoRA runs.
PUBLISHED = {
    "mllm_dcl_llava15": (64, 128.0, 2e-5, 64, 0.0, "pad", "pad"),
    "ucit_llava15": (32, 8.0, 2e-4, 64, 0.0, "pad", "pad"),
    "mllm_dcl_llava15_mcitlib": (64, 128.0, 2e-4, 32, 0.0, "pad", "pad"),
    "ucit_llava15_mcitlib": (32, 64.0, 2e-4, 64, 0.0, "pad", "processor"),
    "mllm_acl_llava15_mcitlib": (64, 128.0, 2e-4, 16, 0.0, "pad", "pad"),
    "coin_llava15": (128, 256.0, 2e-4, 896, 1.0, "pad", "processor"),
}


def test_every_run_of_a_public_benchmark_is_here():
    assert {name for name in shipped("runs") if "llava15" in name} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name, tmp_path):
    rank, alpha, rate, records, norm, trained, asked = PUBLISHED[name]
    config = load_config(name, [f"data_root={tmp_path}"])
    benchmark, options = load_benchmark(config), build_strategy(config.strategy).options
    assert (options.rank, options.alpha, options.sample_spacing) == (rank, alpha, "ends")
    settings = config.train
    assert (settings.lr, settings.batch_size, settings.max_grad_norm) == (rate, records, norm)
    assert settings.loss_mean == "micro_batches"
    for part in benchmark.domains.values():
        assert part.pads_training == (trained == "pad") and part.image_mode == asked, part
    assert config.adapters.projector == "full" and with_published_epochs(config, benchmark)
    engine = files.read_json(Path(deepspeed_file(config.deepspeed)))
    assert engine["gradient_clipping"] == "auto", "as train.max_grad_norm says"


# KeepLoRA's runs on MTIL (MaolinLuo/KeepLoRA a17f9c2, 7abf7ec, 536498e): epochs of the tasks in their order.
MTIL = {
    "": [10] * 10 + [5],
    "_order2": [5, 2, 5, 5, 5, 5, 10, 10, 10, 10, 10],
    "_plus": [5] * 11,
    "_plus_order2": [5, 1, 1, *[5] * 8],
    "_pp": [10] * 10 + [5],
    "_pp_order2": [5, 2, 5, 5, 5, 5, 10, 10, 10, 10, 10],
    "_pp_cls": [5] * 11,
    "_pp_cls_order2": [5, 1, 1, *[5] * 8],
}


def test_every_run_on_mtil_is_here():
    assert {name for name in shipped("runs") if name.startswith("mtil_")} == {
        f"mtil_clip_vitb16{kind}" for kind in MTIL
    }


@pytest.mark.parametrize("kind", MTIL)
def test_settings_on_mtil_are_the_published_ones(kind, tmp_path):
    config = load_config(f"mtil_clip_vitb16{kind}", [f"data_root={tmp_path}"])
    benchmark = load_benchmark(config)
    assert list(benchmark.domains) == benchmark.orders["order2" if "order2" in kind else "order1"]
    epochs = [with_published_epochs(config, benchmark).train_of(name).epochs for name in benchmark.domains]
    assert epochs == MTIL[kind]
    settings = config.train
    assert (settings.lr, settings.schedule, settings.weight_decay) == (1e-3, "one_cycle", 0.01)
    assert (settings.batch_size, settings.max_grad_norm, config.seed) == (64, 0.0, 42)
    assert config.strategy.preset == ("official-mtil-pp" if "pp" in kind else "official-mtil")
    assert ("prototypes" in config.strategy.options) == ("plus" in kind or "cls" in kind)
    assert config.adapters.projector == "frozen" and config.eval.domains == "all"
    counts = {key: sum(part.counts[key] for part in benchmark.domains.values()) for key in ("classes", "train", "test")}
    assert counts == {"classes": 1201, "train": 319_352, "test": 97_209}


# LAMDA-CL/Prism, config/methods of EWC, replay and O-LoRA: rank, alpha and what else defines the method there.
PRISM = {
    ("ewc", "prism"): {
        "rank": 96,
        "alpha": 192.0,
        "strength": 5000.0,
        "mode": "separate",
        "samples": 400,
        "fisher_batch": 8,
    },
    ("ewc", "prism-coin"): {"rank": 64, "alpha": 128.0, "strength": 5000.0, "samples": 600, "fisher_batch": 12},
    ("replay", "prism"): {"rank": 48, "alpha": 96.0, "buffer": 180, "ratio": "epoch"},
    ("replay", "prism-coin"): {"rank": 64, "alpha": 128.0, "buffer": 180, "ratio": "epoch"},
    ("olora", "prism"): {"rank": 96 // 6, "alpha": 4.0 * 96 / 6, "lambda1": 0.5, "lambda2": 0.0, "penalty": "l1"},
    ("olora", "prism-coin"): {"rank": 64 // 8, "alpha": 4.0 * 64 / 8, "lambda1": 0.5, "lambda2": 0.0},
}


@pytest.mark.parametrize(("strategy", "preset"), PRISM)
def test_presets_prism_are_the_published_ones(strategy, preset):
    options = build_strategy(StrategyConfig(name=strategy, preset=preset)).options.model_dump()
    assert {key: options[key] for key in PRISM[strategy, preset]} == PRISM[strategy, preset]
