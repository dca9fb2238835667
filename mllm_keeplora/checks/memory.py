"""How much memory a run will take, stage by stage, computed from the base's skeleton before a weight is loaded.

The base's family says what a token costs, the strategy what its hooks take; docs/memory.md has the formulae and how
they were checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.stored import LIVE
from mllm_keeplora.config import RunConfig
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.strategies.footprint import ALWAYS, PassSizes
from mllm_keeplora.training.deepspeed import zero_settings

if TYPE_CHECKING:
    import torch

    from mllm_keeplora.models.family import Family, Parts

ADAM, GRADIENT, MASTER = 8, 4, 4  # bytes of a trained number: two moments, its gradient, itself; all float32
QUANTISED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes of a number: a float32 scale for each 64, for each row
LONGEST_ANSWER = 128
HOOKS = {"prepare": "prepare", "gradient": "before_domain", "consolidate": "after_domain"}  # stage -> a strategy's hook


@dataclass(frozen=True)
class Estimate:
    """Tells the bytes that each stage takes on each device, by what takes them, and those on the host.

    Not counted: the vision tower's own temporaries, what libraries reserve, fragmentation (10 to 20 % on a GPU).
    """

    stages: dict[str, dict[str, float]]
    host: float  # of states that are offloaded, and of what a strategy keeps there beside a GPU
    where: str  # device, precision and record length that it is for


def estimate(
    config: RunConfig,
    strategy: Strategy,
    family: Family,
    model: Any,
    parts: Parts,
    tokens: int,
    answer_tokens: float,
    domains: int,
    dtype: torch.dtype,
    on_gpu: bool,
    world: int = 1,
    classes: int = 0,
) -> Estimate:
    """Estimate the memory of every stage of a run in which the strategy or the run has something to do.

    Args:
        config, strategy: of the run.
        family, model, parts: of the base; the model is its skeleton, which is no use afterwards.
        tokens: of a long record, image tokens included; answer_tokens: of those that carry loss.
        domains: learnt before and by this run.
        dtype: of the weights in memory; on_gpu: moments are float32 there, float64 on a CPU.
        world: processes that ZeRO divides over.
        classes: of the longest list whose texts are read in a training batch.
    """
    train, rank = config.train, getattr(strategy.options, "rank", 0)
    layers = tuple((m.out_features, m.in_features) for m in map(model.get_submodule, parts.target_layers))
    zero = zero_settings(config.deepspeed)
    stage, offloaded = zero.get("stage", 0), "offload_optimizer" in zero
    # Numbers that train: of the branches, and of projectors in full.
    projectors = map(model.get_submodule, parts.projectors if config.adapters.projector == "full" else ())
    in_full = sum(parameter.numel() for projector in projectors for parameter in projector.parameters())
    frozen = rank * sum(d_in for _, d_in in layers) if "A" not in strategy.trains else 0
    numbers = rank * sum(map(sum, layers)) - frozen + in_full
    weights = _weights(config, model, parts, dtype.itemsize)
    past, is_merged = _past(config, strategy, layers, dtype, domains)
    whole, without = (sum(family.feature_sizes(model, pictures)) for pictures in (True, False))
    sizes = PassSizes(
        base=family.sizes(model, parts, dtype),
        layers=layers,
        rank=rank,
        numbers=numbers,
        tokens=tokens,
        answer_tokens=answer_tokens,
        item=dtype.itemsize,
        moment=4 if on_gpu else 8,
        micro=train.micro_batch_size or max(1, train.batch_size // world),
        probe=train.probe_batch_size,
        question=(whole, without),
        checkpointing=train.gradient_checkpointing,
        trains_a="A" in strategy.trains,
        classes=classes,
        domains=domains,
    )
    # What ZeRO leaves to each process, and what it moves to the host.
    divided = {1: ADAM, 2: ADAM + GRADIENT, 3: ADAM + GRADIENT + MASTER}.get(stage, 0)
    share = numbers * divided / world  # of the states that ZeRO divides
    states = numbers * (ADAM + GRADIENT + MASTER - divided) + 4 * frozen
    own = strategy.footprint(sizes)
    always = own.get(ALWAYS, {})
    on_host = (weights if offloaded and stage == 3 else 0.0) + (share if offloaded else 0.0)
    common = {
        "weights": 0.0 if offloaded and stage == 3 else weights / (world if stage == 3 else 1),  # come layer by layer
        "past domains": past / (world if stage == 3 and is_merged else 1),
        **({} if on_gpu else always),  # beside a GPU it is on the host
    }
    asked = config.eval.batch_size
    cache = sizes.base.cached * (tokens + (config.eval.max_new_tokens or LONGEST_ANSWER))
    plain = {
        "train": {
            "graph": sizes.graph(sizes.micro, rank),
            "branch and optimizer": states + (0.0 if offloaded else share),
        },
        "evaluate": {"keys and values": cache * asked, "forward": sizes.forward(asked)},
    }
    # A stage takes memory of its own where the run or a hook of the strategy has something to do in it.
    stages = {
        name: {**common, **plain.get(name, {}), **own.get(name, {})}
        for name in ("prepare", "gradient", "train", "consolidate", "evaluate")
        if name in plain or getattr(type(strategy), HOOKS[name]) is not getattr(Strategy, HOOKS[name])
    }
    where = f"{'GPU' if on_gpu else 'CPU'}, {str(dtype).removeprefix('torch.')}, records of {tokens} tokens"
    return Estimate(stages, on_host + (sum(always.values()) if on_gpu else 0.0), where)


def _past(
    config: RunConfig, strategy: Strategy, layers: tuple[tuple[int, int], ...], dtype: torch.dtype, domains: int
) -> tuple[float, bool]:
    """Bytes of the past, and whether it is merged: pristine weights; else all factors, or dense ones if smaller."""
    numel = sum(d_out * d_in for d_out, d_in in layers)
    factors = 4 * getattr(strategy.options, "rank", 0) * domains * sum(map(sum, layers))
    if strategy.combine in LIVE:  # branches that are weighed by the question are never merged
        return factors, False
    by_itself = config.adapters.history == "auto" and config.base.quantization is None and dtype.itemsize == 4
    if config.adapters.history == "merged" or by_itself:
        return numel * dtype.itemsize, True
    return min(factors, 4 * numel), False


def _weights(config: RunConfig, model: Any, parts: Parts, item: int) -> float:
    """Bytes of all weights, each stored once; of a quantised base the language model's layers in few bits."""
    import torch

    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    total = sum(unique.values())
    if config.base.quantization is None:
        return total * item
    language, head = model.get_submodule(parts.language_model), model.get_output_embeddings()
    packed = sum(m.weight.numel() for m in language.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return packed * QUANTISED[config.base.quantization] + (total - packed) * 4
