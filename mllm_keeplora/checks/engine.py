"""What a run's engine cannot do: settings of DeepSpeed, quantisation and the Trainer that do not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mllm_keeplora.adapters.stored import LIVE
from mllm_keeplora.config import RunConfig
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.models.base import compute_dtype
from mllm_keeplora.strategies import Strategy
from mllm_keeplora.system import files
from mllm_keeplora.training.deepspeed import deepspeed_file

WEIGHED = ("gate", "route")  # how branches combine that are weighed by the question
IN_ZERO3 = {  # what a strategy may need that it does not have there
    "parameters": "needs its trained parameters whole, which ZeRO-3 divides",
    "forwards": "runs the model more often in one process than in another, which ZeRO-3 does not allow",
}


def unfit_for_towers(config: RunConfig, strategy: Strategy, stage: int | None) -> Iterator[str]:
    """Say what of a run is not for a base that compares pictures with texts of classes."""
    name, base = config.strategy.name, config.base.model
    if strategy.combine in WEIGHED:
        yield (
            f"strategy {name} weighs its branches by what frozen parts of a base see, but both towers of {base} learn; "
            "take a strategy that sums its branches"
        )
    if stage == 3:  # which cannot divide a temperature without a dimension, nor an attention that is one fused function
        yield (
            f"deepspeed {config.deepspeed!r}: ZeRO-3 does not divide the towers of {base}, which are small; deepspeed "
            "may be null, zero1 or zero2"
        )
    unused = {
        "base.quantization": config.base.quantization,
        "train.max_length": config.train.max_length,
        "eval.max_new_tokens": config.eval.max_new_tokens,
        "base.prompt": None if config.base.prompt == "auto" else config.base.prompt,
    }
    for key, value in unused.items():
        if value is not None:
            yield f"{key} is {value!r}, but {base} compares pictures with texts of classes; leave it out"


def unfit_for(config: RunConfig, strategy: Strategy, stage: int | None) -> list[str]:
    """Say what a strategy cannot do under a run's DeepSpeed, or with a projector that is trained in full."""
    faults, name = [], config.strategy.name
    if strategy.stream == "none":
        faults.append(f"strategy {name} trains nothing")
    if "gradients" in strategy.needs and config.deepspeed is not None:
        faults.append(
            f"deepspeed {config.deepspeed!r}: strategy {name} needs the gradients between backward and step, which "
            "DeepSpeed does not give; deepspeed may be null"
        )
    elif stage == 3 and strategy.needs & IN_ZERO3.keys():
        why = " and ".join(text for need, text in IN_ZERO3.items() if need in strategy.needs)
        faults.append(f"deepspeed {config.deepspeed!r}: strategy {name} {why}; deepspeed may be null, zero1 or zero2")
    is_half = config.base.quantization is None and compute_dtype(config.base.dtype).itemsize == 2
    if is_half and config.adapters.projector == "full" and config.deepspeed is None:
        faults.append(
            "adapters.projector is full: without DeepSpeed bfloat16 weights would be trained as they are, and most "
            "steps be rounded off; allowed: deepspeed zero1, zero2 or zero3, or base.dtype float32"
        )
    if config.adapters.projector == "full" and strategy.combine in LIVE:
        faults.append(
            f"adapters.projector is full: strategy {name} weighs its branches by the question, which a projector "
            "trained in full has none of; allowed: keeplora, frozen"
        )
    return faults


def settings_faults(config: RunConfig, stage: int | None) -> Iterator[str]:
    """Say which settings of base, DeepSpeed and Trainer do not fit together, whatever the strategy."""
    from mllm_keeplora.training.arguments import rehearse, training_arguments

    quantization = config.base.quantization
    if quantization is not None and config.adapters.history == "merged":
        yield (
            f"adapters.history is merged, but weights quantised as {quantization} cannot be merged into; "
            "allowed: auto, factors"
        )
    if quantization is not None and stage == 3:
        yield (
            f"base.quantization {quantization!r}: ZeRO-3 (deepspeed {config.deepspeed!r}) does not divide "
            "quantised weights; deepspeed may be null, zero1 or zero2"
        )
    reactions = {config.train.on_nonfinite, *(config.train_of(name).on_nonfinite for name in config.per_domain)}
    if config.deepspeed is not None and stage is not None and reactions != {"stop"}:
        settings = files.read_json(Path(deepspeed_file(config.deepspeed)))
        if stage == 0 or not settings.get("bf16", {}).get("check_grad_overflow", True):
            yield (
                f"train.on_nonfinite {known(reactions - {'stop'})}: DeepSpeed {config.deepspeed!r} takes a step whose "
                "gradient is not finite; allowed: stop, or ZeRO stages 1 to 3 without bf16.check_grad_overflow false"
            )
    try:
        for settings in [config.train, *map(config.train_of, config.per_domain)]:
            training_arguments(settings, settings.epochs or 1.0, Path(config.output_dir), 0, None, bf16=False)
            if settings.args or settings.schedule not in ("cosine", "linear", "constant"):  # they need nothing more
                rehearse(settings)
    except UserError as error:
        yield from error.sentences
