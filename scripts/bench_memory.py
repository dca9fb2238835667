"""Estimated memory against measured peaks, for the gradient pass, a training step and the feature pass.

    python scripts/bench_memory.py                               tiny-llava
    python scripts/bench_memory.py tiny-llava smollm2-llava      bases by name or folder

Measured is the most bytes of new tensors alive at once beyond the loaded model (work space inside library calls is not
seen); estimated is what `check` prints without weights, past domains and kept bases. One JSON object after the table.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from bench.measure import peak_bytes
from rich.console import Console
from rich.table import Table

from mllm_keeplora import load_config
from mllm_keeplora.adapters import Branch, adapters_for
from mllm_keeplora.checks.memory import estimate
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.models import load_base
from mllm_keeplora.models.base import skeleton
from mllm_keeplora.models.causal.losses import supervised_logits
from mllm_keeplora.models.shipped import resolve_path
from mllm_keeplora.probes.features import collect_moments
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.plans import GradientPlan
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.training.trainer import answer_loss

BATCH, RANK = 8, 16
BESIDE = {"weights", "past domains", "kept bases", "decomposition"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", default=["tiny-llava"])
    lines = [line for name in parser.parse_args().bases for line in compared(name)]
    table = Table("base", "pass", "estimated MB", "measured MB", "estimated / measured")
    for line in lines:
        table.add_row(
            line["base"], line["pass"], f"{line['estimated'] / 1e6:.1f}", f"{line['measured'] / 1e6:.1f}",
            f"{line['estimated'] / line['measured']:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"batch": BATCH, "lines": lines}))


def compared(name: str) -> list[dict[str, Any]]:
    """Three passes of one base over one batch of the mini benchmark's first domain."""
    config = load_config(
        "mini_dcl", [f"base.model={name}", f"train.batch_size={BATCH}", f"train.probe_batch_size={BATCH}"]
    )
    base = load_base(config.base, "keeplora")
    records = evenly_spaced(load_benchmark(config).train_records("RS"), BATCH)
    batch = base.family.training_batch(records)
    layers = {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}
    plan = GradientPlan("sketch", 3 * RANK, following=True)
    measured = {
        "gradient": peak_bytes(lambda: collect_mean_gradients(base.family, base.model, layers, [batch], plan)),
        "consolidate": peak_bytes(lambda: collect_moments(base.family, base.model, layers, [batch])),
    }
    adapters = adapters_for(base, "keeplora", "factors")
    adapters.open(Branch({n: torch.randn(RANK, m.in_features) for n, m in layers.items()}, dict.fromkeys(layers, 32.0)))
    measured["train"] = peak_bytes(lambda: step(adapters, dict(batch)))
    measured["train"] += 12 * sum(p.numel() for p in adapters.trainable().values())  # itself, and what Adam keeps
    measured["train"] += 4 * sum(RANK * m.in_features for m in layers.values())  # A
    answers = int((batch["labels"] != -100).sum()) / BATCH
    found = estimate(
        config, build_strategy(config.strategy, "mini_dcl"), base.family, skeleton(resolve_path(name), torch.float32),
        base.parts, batch["input_ids"].shape[1], answers, 0, torch.float32, on_gpu=False,
    )  # fmt: skip
    return [
        {"base": name, "pass": stage, "measured": peak,
         "estimated": sum(value for key, value in found.stages[stage].items() if key not in BESIDE)}
        for stage, peak in measured.items()
    ]  # fmt: skip


def step(adapters: Any, batch: dict) -> None:
    """Forward and backward of one training step; the optimizer's states are added by their size."""
    labels = batch.pop("labels")
    with supervised_logits(adapters.base, labels):
        outputs = adapters.model(**batch)
    answer_loss(adapters.family, outputs, labels).backward()


if __name__ == "__main__":
    main()
