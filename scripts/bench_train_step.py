"""A training step against plain peft LoRA of the same rank on the same batch, side by side in one process.

    python scripts/bench_train_step.py                               tiny-llava
    python scripts/bench_train_step.py tiny-llava smollm2-llava      bases by name or folder

Ours: the branch as KeepLoRA trains it, B alone, logits at supervised positions. Reference: `get_peft_model` on the same
layers, A and B trained, the model's own loss over all logits. A step is forward, backward and AdamW. Saved activations
are the bytes that the graph keeps for its backward pass, weights left out. The floor is forward and backward of the
frozen base down to its embeddings, with no adapter at all. A table, then one JSON object; below 1 is better.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from bench.measure import side_by_side
from rich.console import Console
from rich.table import Table

from mllm_keeplora import load_config
from mllm_keeplora.adapters import Branch, adapters_for
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.models import load_base
from mllm_keeplora.models.causal.losses import graph_from_inputs, supervised_logits
from mllm_keeplora.training.trainer import answer_loss

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", default=["tiny-llava"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [compared(name, options) for name in options.bases]
    table = Table("base", "tokens", "time", "ours", "peft", "saved activations", "of the floor's time")
    for line in lines:
        table.add_row(
            line["base"], line["tokens"], f"{line['time_ratio']:.3f}", f"{line['ours_s']:.3f} s",
            f"{line['peft_s']:.3f} s", f"{line['saved_ratio']:.3f}", f"{line['floor_ratio']:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"threads": options.threads, "rank": RANK, "lines": lines}))


def compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One base, one batch of the mini benchmark's first domain."""
    config = load_config("mini_dcl", [f"base.model={name}"])
    base, plain = (load_base(config.base, "keeplora") for _ in range(2))
    records = evenly_spaced(load_benchmark(config).train_records("RS"), options.batch_size)
    batch = base.family.training_batch(records)
    ours, reference, floor = our_step(base, batch), peft_step(plain, batch), floor_pass(plain, batch)
    saved = saved_bytes(ours) / saved_bytes(reference)
    timing = side_by_side(ours, reference, options.repeats)
    above = side_by_side(ours, floor, options.repeats)
    return {
        "base": name, "tokens": "{} x {}".format(*batch["input_ids"].shape), "time_ratio": timing.ratio,
        "ours_s": timing.ours, "peft_s": timing.reference, "saved_ratio": saved, "floor_ratio": above.ratio,
    }  # fmt: skip


def our_step(base: Any, batch: dict):
    adapters = adapters_for(base, "keeplora", "factors")
    layers = {name: base.model.get_submodule(name) for name in base.parts.target_layers}
    A = {name: torch.linalg.qr(torch.randn(layer.in_features, RANK))[0].mT for name, layer in layers.items()}
    adapters.open(Branch(A, dict.fromkeys(A, 2.0 * RANK)))
    adapters.model.train()
    optimizer = torch.optim.AdamW(adapters.trainable().values(), 1e-4)
    labels, inputs = batch["labels"], {key: value for key, value in batch.items() if key != "labels"}

    def step() -> None:
        with supervised_logits(adapters.base, batch):
            outputs = adapters.model(**inputs)
        answer_loss(base.family, outputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(base: Any, batch: dict):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(base.parts.target_layers))
    model = get_peft_model(base.model, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_pass(base: Any, batch: dict):
    """Of the very model that peft has wrapped, its branches switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = [module for module in base.model.modules() if isinstance(module, BaseTunerLayer)]

    def run() -> None:
        for module in tuned:
            module.enable_adapters(False)
        with graph_from_inputs(base.model):
            base.model(**batch).loss.backward()
        for module in tuned:
            module.enable_adapters(True)

    return run


def saved_bytes(step: Any) -> int:
    """Bytes of the distinct storages that the graph of a step keeps, parameters left out."""
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


if __name__ == "__main__":
    main()
