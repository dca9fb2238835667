"""Estimated memory against measured peaks: what a strategy does before a domain, a training step, what it does behind.

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
from mllm_keeplora.adapters import Adapters, adapters_for
from mllm_keeplora.checks.memory import estimate
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.models import Base, load_base
from mllm_keeplora.models.base import skeleton
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.shipped import resolve_path
from mllm_keeplora.strategies import DomainInfo, Strategy, build_strategy
from mllm_keeplora.strategies.context import Context
from mllm_keeplora.training.trainer import answer_loss

BATCH = 8
RUNS = {"keeplora": "mini_dcl", "inflora": "mini_dcl_inflora", "routed": "mini_dcl_routed", "ewc": "mini_dcl_ewc"}
LOOKING = {"keeplora", "inflora"}  # at data, before a domain
BESIDE = {"weights", "past domains", "kept bases"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", default=["tiny-llava"])
    lines = [line for name in parser.parse_args().bases for strategy in RUNS for line in compared(name, strategy)]
    table = Table("base", "strategy", "stage", "estimated MB", "measured MB", "estimated / measured")
    for line in lines:
        table.add_row(
            line["base"], line["strategy"], line["stage"], f"{line['estimated'] / 1e6:.1f}",
            f"{line['measured'] / 1e6:.1f}", f"{line['estimated'] / line['measured']:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"batch": BATCH, "lines": lines}))


def compared(name: str, strategy: str) -> list[dict[str, Any]]:
    """The stages of one strategy on one base, over one batch of the mini benchmark's first domain."""
    overrides = [f"base.model={name}", f"train.batch_size={BATCH}", f"train.probe_batch_size={BATCH}"]
    if strategy == "routed":
        overrides.append(f"strategy.samples={BATCH}")  # what is kept of each question counts
    config = load_config(RUNS[strategy], overrides)
    base, built = load_base(config.base, config.adapters.projector), build_strategy(config.strategy)
    records = evenly_spaced(load_benchmark(config).train_records("RS"), BATCH)
    found, peaks = estimated(config, built, base, records), measured(built, base, records)
    return [
        {"base": name, "strategy": strategy, "stage": stage, "estimated": found[stage], "measured": peak}
        for stage, peak in peaks.items()
        if stage != "gradient" or strategy in LOOKING
    ]


def estimated(config: RunConfig, strategy: Strategy, base: Base, records: list) -> dict[str, float]:
    """Bytes of every stage by the estimate, beyond what lies there already."""
    batch = base.family.training_batch(records)
    tokens, answers = batch["input_ids"].shape[1], int((batch["labels"] != -100).sum()) / len(records)
    model = skeleton(resolve_path(config.base.model), torch.float32)
    shape = (tokens, answers, 0, torch.float32, False)
    stages = estimate(config, strategy, base.family, model, base.parts, *shape).stages
    return {stage: sum(taken for what, taken in each.items() if what not in BESIDE) for stage, each in stages.items()}


def measured(strategy: Strategy, base: Base, records: list) -> dict[str, int]:
    """Peaks of a strategy's hooks over records, and of one training step between them."""
    adapters = adapters_for(base, "keeplora", "factors")
    generator = torch.Generator().manual_seed(0)
    domain = DomainInfo(0, "RS")
    context = Context(base, adapters, {}, domain, records, base.family.training_batch, generator, len(records))
    strategy.prepare(context)
    begun: list = []
    peaks = {"gradient": peak_bytes(lambda: begun.append(strategy.before_domain(context)))}
    adapters.open(begun.pop())
    peaks["train"] = peak_bytes(lambda: step(adapters, base.family.training_batch(records)))
    trained = adapters.trainable()
    peaks["train"] += 12 * sum(each.numel() for each in trained.values())  # itself, and what Adam keeps
    if "A" not in strategy.trains:
        peaks["train"] += 4 * sum(A.numel() for A in adapters.branch.A.values())
    for each in trained.values():
        each.grad = None
    if type(strategy).after_domain is not Strategy.after_domain:
        peaks["consolidate"] = peak_bytes(lambda: strategy.after_domain(context))
    return peaks


def step(adapters: Adapters, batch: dict) -> None:
    """Forward and backward of one training step; the optimizer's states are added by their size."""
    with adapters.family.supervised(adapters.base, batch):
        outputs = adapters.model(**inputs_of(batch))
    answer_loss(adapters.family, outputs, batch["labels"]).backward()


if __name__ == "__main__":
    main()
