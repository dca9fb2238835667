"""Load a base MLLM by config and name its parts. What is learnt on top of it belongs to `adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.models.causal import CausalFamily
from mllm_keeplora.models.causal.parts import ALL_LINEARS, expert_weights
from mllm_keeplora.models.causal.prompt import ChatPrompt
from mllm_keeplora.models.dual import DualFamily
from mllm_keeplora.models.family import Family, Parts
from mllm_keeplora.models.fingerprint import identity_of
from mllm_keeplora.models.reading import read_config, read_model, read_processor, skeleton
from mllm_keeplora.models.shipped import clip_input, prompt_style, resolve, settings_of
from mllm_keeplora.models.weights import refuse_not_finite, refuse_small_vocabulary, refuse_unfilled, refuse_unfit
from mllm_keeplora.system import distributed
from mllm_keeplora.system.log import log

FAMILIES: dict[str, type[Family]] = {"causal": CausalFamily, "dual": DualFamily}  # by the name in a base's YAML
TASKS = {"generate": "causal", "classify": "dual"}


@dataclass
class Base:
    """A loaded base model with its processor, its parts by exact name and the family that it belongs to."""

    name: str
    model: Any
    processor: Any
    family: Family
    parts: Parts
    fingerprint: str

    @property
    def prompt(self) -> ChatPrompt:
        """The prompt of a base that has one."""
        return self.family.prompt


def load_base(
    config: BaseConfig, projector: str, target: str | Sequence[str] = ALL_LINEARS, known_as: str | None = None
) -> Base:
    """Load model and processor; every parameter is frozen and the model is in evaluation mode.

    Args:
        config, projector: the `base` section of a run, and `adapters.projector`.
        target: `adapters.target`; empty where nothing is to be adapted.
        known_as: fingerprint of the weights that a run was started with: of a hub's base that revision is loaded.

    Raises:
        UserError: the checkpoint cannot be loaded, does not fill the model, holds nan or inf, needs code of its own
            that is not trusted, has other weights, has no part that must be named, or belongs to no known family.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    location, dtype = resolve(config), compute_dtype(config.dtype)
    refuse_original_llava(config.model, location)
    identity, pinned = identity_of(config.model, location, known_as)
    trusted, kind = config.trust_remote_code, family_of(config, location, **pinned)
    if Path(location).is_dir() and not is_deepspeed_zero3_enabled():  # which divides a model that is not there, too
        refuse_unfit(Path(location), trusted, identity, kind.auto)

    def load(attention: str) -> tuple[Any, dict[str, Any]]:
        settings = {"dtype": dtype, "attn_implementation": attention, **pinned, **_quantisation(config, location)}
        return read_model(location, trusted, kind.auto, **settings)

    processor = read_processor(location, trusted, **pinned)
    try:
        model, told = load(config.attn)
    except UserError as error:
        if config.attn != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        log.info("%s has no sdpa attention: taking eager", config.model)
        model, told = load("eager")
    refuse_unfilled(location, told)
    if config.quantization is not None:
        from peft import prepare_model_for_kbit_training

        # bitsandbytes would repack 4-bit weights in place at the first answer on CPUs with AVX512-BF16: they could not
        # be read as the base's any more, differ from other machines', and need widths of whole quantisation blocks
        for module in model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # norms and heads to float32
    model.requires_grad_(False).eval()
    if torch.cuda.is_available():
        if dtype.itemsize == 2:  # float32 products, those of branches, are TF32 beside a base in half precision
            torch.set_float32_matmul_precision("high")
        if config.quantization is None:
            model.to(distributed.device())
    refuse_not_finite(config.model, location, model)
    refuse_small_vocabulary(config.model, processor, kind.vocabulary(model))
    family = kind.of(
        processor, model.config, prompt_style(config), getattr(model, "generation_config", None), clip_input(config)
    )
    return Base(config.model, model, processor, family, family.name_parts(model, projector, target), identity)


def family_of(config: BaseConfig, location: str, **hub: Any) -> type[Family]:
    """Tell the family of a base: as `base.task` says, else its YAML, else the class that its config belongs to.

    Args:
        config, location: the `base` section of a run, and the folder or hub id of its base.
        hub: arguments of a hub's base, such as its revision.

    Raises:
        UserError: the config cannot be read, is of no family, or its YAML names an unknown one.
    """
    if config.task != "auto":
        return FAMILIES[TASKS[config.task]]
    settings = settings_of(config.model)
    name = settings.get("family", "causal" if settings else None)
    if name is not None and name not in FAMILIES:
        raise UserError(f"family {name!r} is not known; known: {known(FAMILIES)} (YAML of base.model {config.model!r})")
    if name is not None:
        return FAMILIES[name]
    from transformers.models.auto import modeling_auto

    kind = type(read_config(location, config.trust_remote_code, **hub))
    mappings = {name: vars(modeling_auto)[family.auto]._model_mapping for name, family in FAMILIES.items()}
    return next((FAMILIES[name] for name, mapping in mappings.items() if kind in mapping), CausalFamily)


def _quantisation(config: BaseConfig, location: str) -> dict[str, Any]:
    """Arguments that make `from_pretrained` quantise the language model; tower, projector and head stay as they are."""
    if config.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    empty = skeleton(location, trusted=config.trust_remote_code)
    parts = CausalFamily.name_parts(empty, "frozen", ())
    if experts := expert_weights(empty, parts.language_model):
        raise UserError(
            f"base.quantization {config.quantization!r}: {experts[0]} and {len(experts) - 1} more hold a mixture's "
            "experts in one tensor, which bitsandbytes does not quantise; leave base.quantization out"
        )
    heads = [name for name, module in empty.named_modules() if module is empty.get_output_embeddings()]
    dtype, skipped = compute_dtype(config.dtype), [parts.vision_tower, *parts.other_towers, *parts.projectors, *heads]
    kinds: dict[str, dict[str, Any]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
        "int8": {"load_in_8bit": True},
    }
    settings = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **kinds[config.quantization])
    return {"quantization_config": settings, "device_map": {"": distributed.device()}}


def refuse_original_llava(model: str, location: str) -> None:
    """Refuse a checkpoint of LLaVA's own code, which shares only its model type with transformers' LLaVA.

    Raises:
        UserError: it is one; the converter is named.
    """
    from transformers import PretrainedConfig

    try:
        settings = PretrainedConfig.get_config_dict(location)[0]
    except Exception:  # of whatever kind: loading tells what is wrong
        return
    if "mm_vision_tower" in settings:
        raise UserError(
            f"base.model {model!r} is a checkpoint of the original LLaVA code; convert it with transformers' "
            "models/llava/convert_llava_weights_to_hf.py (llava_next, llava_onevision have one of their own), or take "
            "a converted one such as llava-hf/llava-1.5-7b-hf"
        )


def compute_dtype(name: str):
    """Resolve `auto`: float32 on a CPU, bfloat16 on a GPU, never float16 (transformers' auto is the checkpoint's)."""
    import torch

    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)
