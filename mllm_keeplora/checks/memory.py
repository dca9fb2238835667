"""How much memory a run will take, stage by stage, computed from the base's skeleton before a weight is loaded.

Activations are no formula for one architecture: the language model's skeleton runs on fake tensors, which have shapes
and no content, and what its graph saves is counted. docs/memory.md has the formulae and how they were checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.stored import LIVE
from mllm_keeplora.config import RunConfig
from mllm_keeplora.models.causal.parts import Parts
from mllm_keeplora.models.running import removed_afterwards
from mllm_keeplora.strategies import Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.agem import AGEM
from mllm_keeplora.strategies.baselines.ewc import EWC
from mllm_keeplora.strategies.subspace.gpm import GPM

if TYPE_CHECKING:
    import torch

ADAM, GRADIENT, MASTER = 8, 4, 4  # bytes of a trained number: two moments, its gradient, itself; all float32
QUANTISED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes of a number: a float32 scale for each 64, for each row
SKETCH = 3  # sketch columns for each direction wanted, where the options name no width
LONGEST_ANSWER = 128
DOUBLES = 4  # float64 matrices of the largest width alive in a decomposition: moments, rotated, vectors, work


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, by what takes them, for every stage; and on the host where states are offloaded to it.

    Not counted: the vision tower's own temporaries, what libraries reserve, fragmentation (10 to 20 % on a GPU).
    """

    stages: dict[str, dict[str, float]]
    host: float
    where: str  # device, precision and record length that it is for

    def total(self, stage: str) -> float:
        """Bytes of a stage on one device."""
        return sum(self.stages[stage].values())


@dataclass(frozen=True)
class Traced:
    """What one token costs in the language model's graph: bytes saved, and widths of the distinct inputs of targets."""

    saved: float
    input_widths: tuple[int, ...]
    blocks: int


def estimate(
    config: RunConfig, strategy: Strategy, model: Any, parts: Parts, tokens: int, answer_tokens: float,
    domains: int, dtype: torch.dtype, on_gpu: bool, world: int = 1,
) -> Estimate:  # fmt: skip
    """Memory of every stage of a run; of stages that a strategy has no use for nothing is said.

    Args:
        config, strategy: of the run.
        model, parts: skeleton of the base, and its parts; the skeleton is no use afterwards.
        tokens: of a long record, image tokens included; answer_tokens: of those that carry loss.
        domains: learnt before and by this run.
        dtype: of the weights in memory; on_gpu: moments are float32 there, float64 on a CPU.
        world: processes that ZeRO divides over.
    """
    layers = [model.get_submodule(name) for name in parts.target_layers]
    options = strategy.options
    item, train = dtype.itemsize, config.train
    stage, offloaded = _zero(config.deepspeed)
    traced = trace(model, parts, dtype)
    micro = train.micro_batch_size or max(1, train.batch_size // world)
    weights = _weights(config, model, parts, item)
    host = weights if offloaded and stage == 3 else 0.0
    states, moved = _states(config, options, model, parts, layers, stage, world, offloaded)
    common = {
        "weights": 0.0 if host else weights / (world if stage == 3 else 1),  # offloaded ones come layer by layer
        "past domains": _past(config, strategy, layers, item, domains, world if stage == 3 else 1),
    }
    kept = {"kept bases": 4 * sum(layer.in_features**2 for layer in layers) // 2 if _keeps_features(options) else 0}
    common |= {} if on_gpu else kept  # beside a GPU they are on the host
    widest, outputs = (max(each) for each in zip(*((m.in_features, m.out_features) for m in layers), strict=True))
    decomposition = DOUBLES * 8 * widest**2
    forward = item * tokens * (4 * widest + 3 * outputs)  # what one record's layers hold for a moment
    per_answer = model.get_output_embeddings().out_features * (item + 2 * 4)  # logits, in float32, their gradient

    def graph(batch: int, rank: int) -> float:
        saved = traced.saved * tokens * batch
        if train.gradient_checkpointing and rank:
            width = model.get_input_embeddings().embedding_dim
            saved = saved / traced.blocks + traced.blocks * width * item * tokens * batch
        return saved + 4 * rank * len(layers) * tokens * batch + answer_tokens * batch * per_answer

    probe, asked = train.probe_batch_size, config.eval.batch_size
    waiting = (item if _sums_exactly(options) else min(item, 2)) * tokens * probe * sum(traced.input_widths)
    sums = {"graph": graph(probe, 0), "gradient sums": _gradient_sums(options, layers), "layer inputs": waiting}
    moments = {"moments": _moments(options, traced.input_widths, 4 if on_gpu else 8), "forward": forward * probe}
    seen = sums if getattr(options, "feature_source", "") == "post_gradient" else moments
    if isinstance(strategy, EWC):  # one record after the other, over what is known and what is added up
        seen = {"graph": graph(1, 0), "Fisher information": 3 * 4 * _trained(config, options, model, parts, layers)}
    at_once, beside = max(micro, probe) if isinstance(strategy, AGEM) else micro, kept if _at_hand(strategy) else {}
    cache = _cache_per_token(model, item) * (tokens + (config.eval.max_new_tokens or LONGEST_ANSWER))
    stages = {
        "prepare": {**common, "decomposition": decomposition},
        "gradient": {**common, **sums},
        "train": {**common, **beside, "graph": graph(at_once, _rank(options)), "branch and optimizer": states},
        "consolidate": {**common, **seen, "decomposition": 0 if isinstance(strategy, EWC) else decomposition},
        "evaluate": {**common, "keys and values": cache * asked, "forward": forward * asked},
    }  # fmt: skip
    used = {name: taken for name, taken in stages.items() if name not in _unused(strategy)}
    where = f"{'GPU' if on_gpu else 'CPU'}, {str(dtype).removeprefix('torch.')}, records of {tokens} tokens"
    return Estimate(used, host + moved + (sum(kept.values()) if on_gpu else 0.0), where)


def _unused(strategy: Strategy) -> set[str]:
    """Stages that a strategy has nothing to do in."""
    unused = set() if hasattr(strategy.options, "grad_samples") else {"prepare", "gradient"}
    return unused | (set() if _keeps_features(strategy.options) or isinstance(strategy, EWC) else {"consolidate"})


def _rank(options: StrategyOptions) -> int:
    return getattr(options, "rank", 0)


def _keeps_features(options: StrategyOptions) -> bool:
    """Whether kept bases grow by the inputs of layers; GainLoRA does what its base method does."""
    return hasattr(options, "feature_samples") or hasattr(options, "base_options")


def _at_hand(strategy: Strategy) -> bool:
    """Whether kept bases are beside the parameters while these train."""
    return any(isinstance(each, GPM) for each in (strategy, getattr(strategy, "base", None)))


def _past(
    config: RunConfig, strategy: Strategy, layers: list, item: int, domains: int, shares: int
) -> float:  # fmt: skip
    """Merged: pristine copies of the target weights, divided as they are. Factors: of all domains, or dense ones.

    Branches that are weighed by the question are factors always.
    """
    factors = 4 * _rank(strategy.options) * domains * sum(m.in_features + m.out_features for m in layers)
    if strategy.combine in LIVE:
        return factors
    numel = sum(layer.weight.numel() for layer in layers)
    merged_by_itself = config.adapters.history == "auto" and config.base.quantization is None and item == 4
    if config.adapters.history == "merged" or merged_by_itself:
        return numel * item / shares
    return min(factors, 4 * numel)


def _moments(options: StrategyOptions, widths: tuple[int, ...], item: int) -> float:
    """Exact moments of every distinct input, or sketches of twice their size in rows, where they are asked for."""
    rows = 2 * getattr(options, "feature_sketch_size", 0)
    if getattr(options, "feature_statistic", "exact") != "sketch":
        return item * sum(width * width for width in widths)
    return sum(4 * rows * width if rows < width else item * width * width for width in widths)


def _sums_exactly(options: StrategyOptions) -> bool:
    """Whether mean gradients are asked for exactly; by themselves they are where they fit, as sketches else."""
    return hasattr(options, "gradient_plan") and options.gradient_plan().statistic == "exact"


def _gradient_sums(options: StrategyOptions, layers: list) -> float:
    if _sums_exactly(options):
        return 4 * sum(layer.in_features * layer.out_features for layer in layers)
    width = getattr(options, "sketch_width", None) or SKETCH * _rank(options)
    return sum(4 * width * layer.in_features + 2 * width * layer.out_features for layer in layers)


def _states(
    config: RunConfig, options: StrategyOptions, model: Any, parts: Parts, layers: list, stage: int, world: int,
    offloaded: bool,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of the branch and of what its training keeps, on a device and on its host."""
    frozen = _inputs_of(options, layers) if getattr(options, "freeze_a", False) else 0
    trained = _trained(config, options, model, parts, layers)
    divided = {1: ADAM, 2: ADAM + GRADIENT, 3: ADAM + GRADIENT + MASTER}.get(stage, 0)
    share = trained * divided / world
    device = trained * (ADAM + GRADIENT + MASTER - divided) + 4 * frozen
    return (device, share) if offloaded else (device + share, 0.0)


def _inputs_of(options: StrategyOptions, layers: list) -> int:
    """Numbers of all A."""
    return _rank(options) * sum(layer.in_features for layer in layers)


def _trained(config: RunConfig, options: StrategyOptions, model: Any, parts: Parts, layers: list) -> int:
    """How many numbers train."""
    trained = _rank(options) * sum(layer.out_features for layer in layers)
    trained += 0 if getattr(options, "freeze_a", False) else _inputs_of(options, layers)
    if config.adapters.projector == "full":
        trained += sum(p.numel() for name in parts.projectors for p in model.get_submodule(name).parameters())
    return trained


def _cache_per_token(model: Any, item: int) -> float:
    """Keys and values of every block; the config's own names, as all families share them."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * item


def trace(model: Any, parts: Parts, dtype: torch.dtype, tokens: int = 64) -> Traced:
    """Run the language model's skeleton on shapes alone and count what its graph saves; it is no use afterwards."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    decoder = model.get_submodule(parts.language_model)
    saved: dict[int, int] = {}
    inputs: dict[int, int] = {}
    kept: list[Any] = []  # held, so that no identity is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def look(module: Any, args: tuple) -> None:
        kept.append(args[0])
        inputs[id(args[0])] = module.in_features

    handles = [model.get_submodule(name).register_forward_pre_hook(look) for name in parts.language_layers]
    with FakeTensorMode(allow_non_fake_inputs=True), removed_afterwards(handles):
        decoder.to_empty(device="cpu").requires_grad_(False)
        weights = {tensor.untyped_storage()._cdata for tensor in decoder.state_dict(keep_vars=True).values()}
        width = model.get_input_embeddings().embedding_dim
        embedded = torch.zeros(1, tokens, width, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(inputs_embeds=embedded, use_cache=False)
    widths = tuple(inputs.values()) + tuple(model.get_submodule(n).in_features for n in parts.projector_layers)
    return Traced(sum(saved.values()) / tokens, widths, len({parts.depth(n) for n in parts.language_layers}))


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


def _zero(deepspeed: str | None) -> tuple[int, bool]:
    """Stage, 0 for none, and whether the optimizer is on the host."""
    from mllm_keeplora.system import files
    from mllm_keeplora.training.deepspeed import deepspeed_file

    path = deepspeed_file(deepspeed)
    zero = files.read_json(Path(path)).get("zero_optimization", {}) if path else {}
    return int(zero.get("stage", 0)), "offload_optimizer" in zero
