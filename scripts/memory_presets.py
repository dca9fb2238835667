"""Settings for common machines and the memory that each stage of a run takes there, computed as `check` does.

    python scripts/memory_presets.py            the table of docs/cluster.md, as Markdown

Nothing is downloaded or loaded: the models are skeletons of LLaVA-1.5's published sizes. docs/memory.md has the
formulae and how they compare with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from mllm_keeplora import load_config
from mllm_keeplora.checks.memory import Estimate, estimate
from mllm_keeplora.models.causal import CausalFamily
from mllm_keeplora.models.causal.parts import name_parts
from mllm_keeplora.strategies import build_strategy

TOKENS, ANSWER, DOMAINS = 720, 30, 5  # an image is 576 tokens; MLLM-DCL's records are mostly short
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # width, inner width, blocks, heads of Vicuna


@dataclass(frozen=True)
class Preset:
    machine: str
    size: str
    gpus: int
    local: int  # of them in one machine
    overrides: tuple[str, ...]


SKETCHED = ("strategy.feature_statistic=sketch", "strategy.feature_sketch_size=512")
PRESETS = (
    Preset("1 x 24 GB", "7B", 1, 1, ("base.quantization=nf4", *SKETCHED, "train.micro_batch_size=2")),
    Preset("1 x 80 GB", "7B", 1, 1, ("train.micro_batch_size=8",)),
    Preset(
        "1 x 80 GB",
        "13B",
        1,
        1,
        (
            *SKETCHED,
            "train.micro_batch_size=4",
        ),
    ),
    Preset("4 x 80 GB", "7B", 4, 4, ("deepspeed=zero2", "train.micro_batch_size=8")),
    Preset("4 x 80 GB", "13B", 4, 4, ("deepspeed=zero3", "train.micro_batch_size=8")),
    Preset("8 x 80 GB", "13B", 8, 8, (*SKETCHED, "deepspeed=zero2", "train.micro_batch_size=4")),
    Preset("2 x 8 x 80 GB", "13B", 16, 8, ("deepspeed=zero3", "train.micro_batch_size=4")),
)


def main() -> None:
    stages = ("prepare", "gradient", "train", "consolidate", "evaluate")
    print(f"| machine | base | settings | {' | '.join(stages)} | host |")
    print("|---" * (4 + len(stages)) + "|")
    for preset in PRESETS:
        found = estimated(preset)
        gigabytes = " | ".join(f"{sum(found.stages[stage].values()) / 1e9:.0f}" for stage in stages)
        settings = " ".join(f"`{each}`" for each in preset.overrides)
        base, host = f"LLaVA-1.5-{preset.size}", f"{found.host * preset.local / 1e9:.0f}"
        print(f"| {preset.machine} | {base} | {settings} | {gigabytes} | {host} |")


def estimated(preset: Preset) -> Estimate:
    common = ("train.batch_size=64", "train.probe_batch_size=1", "train.gradient_checkpointing=true")
    own = ("strategy.rank=64", "strategy.alpha=128", "eval.batch_size=16", *preset.overrides)
    config = load_config("mini_dcl", [*common, *own])
    model = skeleton(*SIZES[preset.size])
    parts = name_parts(model, config.adapters.projector, config.adapters.target)
    strategy = build_strategy(config.strategy)
    shape = (TOKENS, ANSWER, DOMAINS, torch.bfloat16, True, preset.gpus)
    return estimate(config, strategy, CausalFamily(prompt=None), model, parts, *shape)


def skeleton(width: int, inner: int, blocks: int, heads: int) -> Any:
    """LLaVA-1.5 of a given language model on the meta device, with its CLIP-L/14 tower at 336 pixels."""
    text = hf.LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
    )
    tower = hf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=tower, text_config=text))
    return model.to(torch.bfloat16)


if __name__ == "__main__":
    main()
