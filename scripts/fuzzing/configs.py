"""Configs of runs, sweeps, benchmarks, bases and plugins, read as the commands do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fuzzing.samples import Target, benchmark_values, run_values


def configs_of(home: Path, data: Path) -> list[Target]:
    import yaml

    from mllm_keeplora import config as configs
    from mllm_keeplora.data import load_benchmark
    from mllm_keeplora.models import shipped
    from mllm_keeplora.strategies import build_strategy
    from mllm_keeplora.sweeps.plan import load_sweep, tune_cells

    def as_yaml(values: Any) -> bytes:
        return yaml.safe_dump(values, sort_keys=False).encode()

    def run(path: Path) -> None:
        config = configs.load_config(path)
        json.dumps(config.resolved(), allow_nan=False).encode()
        configs.as_yaml(config.resolved()).encode()
        build_strategy(config.strategy, "fuzz")
        benchmark = load_benchmark(config)
        for name in benchmark.domains:
            config.train_of(name).result_defining()
        os.stat(config.output_dir.parent) if config.output_dir.parent.exists() else None

    def benchmark(path: Path) -> None:
        values = {**run_values(home, data), "benchmark": str(path), "domains": None, "per_domain": {}}
        loaded = load_benchmark(configs.parse_config(values, "fuzz"))
        for name in loaded.domains:
            if loaded.has_training(name):
                len(loaded.train_records(name))
            list(map(loaded.graded(name).suffix_for, loaded.test_records(name)))

    def base(path: Path) -> None:
        named = configs._named("models")
        named["fuzzed"] = path
        shipped._shipped.cache_clear()
        config = configs.BaseConfig(model="fuzzed")
        shipped.resolve(config), shipped.settings_of("fuzzed")

    def sweep(path: Path) -> None:
        for cell in tune_cells(load_sweep(path)):
            cell.config()

    values = run_values(home, data)
    swept = {
        "name": "swept",
        "run": str(home / "swept_run.yaml"),
        "strategies": {"keeplora": ["strategy.rank=2"], "finetune": ["strategy.name=finetune"]},
        "tune": {"key": "train.lr", "grid": [1e-3, 2e-3], "factor": 2.0, "seed": 0},
        "final": {"seeds": [0, 1]},
        "output": str(home / "sweep"),
    }
    (home / "swept_run.yaml").write_bytes(as_yaml(values))
    named = {"path": "package:assets/tiny_llava", "prompt": "chat_template", "family": "causal"}
    plugged = {**values, "plugins": ["json", "os.path"]}
    return [
        Target("run config", "yaml", home / "run.yaml", as_yaml(values), run),
        Target("sweep", "yaml", home / "sweep.yaml", as_yaml(swept), sweep),
        Target("benchmark", "yaml", home / "benchmark.yaml", as_yaml(benchmark_values(data)), benchmark),
        Target("model", "yaml", home / "model.yaml", as_yaml(named), base),
        Target("plugins", "yaml", home / "plugged.yaml", as_yaml(plugged), run),
    ]
