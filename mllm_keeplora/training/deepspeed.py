"""DeepSpeed: settings by name (the shipped JSON files, or a path), and what ZeRO-3 needs outside a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict
from typing_extensions import TypedDict

from mllm_keeplora.errors import UserError, known, shortened
from mllm_keeplora.system import distributed, files

if TYPE_CHECKING:
    from mllm_keeplora.adapters import Adapters


class ZeroSettings(TypedDict, total=False):
    """What is read here of the section on ZeRO; DeepSpeed reads the rest."""

    __pydantic_config__ = ConfigDict(extra="allow")

    stage: Literal[0, 1, 2, 3]


class Settings(TypedDict, total=False):
    """What is read here of DeepSpeed's settings."""

    zero_optimization: ZeroSettings


def deepspeed_file(name: str | None) -> str | None:
    """Find a DeepSpeed JSON by its shipped name (`zero2`) or path; None without DeepSpeed.

    Raises:
        UserError: neither shipped nor a file, or DeepSpeed is not installed.
    """
    if name is None:
        return None
    folder = resources.files("mllm_keeplora.configs") / "deepspeed"
    names = [entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")]
    path = Path(str(folder / f"{name}.json")) if name in names else Path(name)
    if name not in names and not path.is_file():
        raise UserError(f"deepspeed {shortened(repr(name))} is neither a shipped name ({known(names)}) nor a file")
    if find_spec("deepspeed") is None:
        raise UserError("deepspeed is asked for but not installed: pip install 'mllm-keeplora[deepspeed]'")
    return str(path)


def zero_settings(name: str | None) -> dict[str, Any]:
    """Read the ZeRO section of settings by name or path; empty without DeepSpeed."""
    path = deepspeed_file(name)
    return files.read_json(Path(path), Settings).get("zero_optimization", {}) if path else {}


def zero_stage(name: str | None) -> int:
    """Read the ZeRO stage of settings by name or path; 0 without DeepSpeed."""
    return zero_settings(name).get("stage", 0)


@contextmanager
def divided_loading(name: str | None, bf16: bool) -> Iterator[None]:
    """Divide a base that is loaded meanwhile over the processes under ZeRO-3, weight by weight as it is read."""
    if zero_stage(name) != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = files.read_json(Path(deepspeed_file(name)), files.OBJECT)
    settings |= {"train_batch_size": distributed.world_size(), "train_micro_batch_size_per_gpu": 1}
    settings |= {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "bf16": {"enabled": bf16}}
    held = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference alone
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


@contextmanager
def scalars_as_vectors(model: Any) -> Iterator[None]:
    """Give scalar parameters (a CLIP's temperature) a dimension: DeepSpeed sends all of them as rows of bytes."""
    scalars = [each for each in model.parameters() if each.ndim == 0]
    for each in scalars:
        each.data = each.data.reshape(1)
    try:
        yield
    finally:
        for each in scalars:
            each.data = each.data.reshape(())


def release_from_engine(model: Any) -> None:
    """Take off a model what a destroyed engine leaves there, which later engines and passes would meet.

    Parameters that the engine kept whole on every process are divided again.
    """
    for module in model.modules():
        for leftover in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining"):
            module.__dict__.pop(leftover, None)
        if "_original_parameters" in module.__dict__:
            module._parameters = dict(module._parameters)
            del module._original_parameters
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.ds_persist = False
            if parameter.numel() > 0:
                parameter.partition()


def parameters_of(branches: Adapters) -> dict[str, tuple[Any, Any]]:
    """Note every parameter's dtype before an engine has it, and the values of those that a mixer holds fixed."""
    trained = {id(each) for each in branches.trainable().values()}
    fixed = {id(each) for each in branches.mixer.parameters()} - trained if branches.mixer is not None else set()
    named = branches.model.named_parameters()
    return {name: (each.dtype, each.detach().clone() if id(each) in fixed else None) for name, each in named}


@contextmanager
def exact_afterwards(branches: Adapters, before: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    """Undo the rounding of an engine in half precision that is destroyed in the block.

    Afterwards all parameters have their dtype of before; those of float32 have the values that were trained, and those
    that a mixer holds fixed (gates of earlier domains) the values that they had. What ZeRO-3 divides stays as it is.

    Args:
        branches: of the base that was trained.
        before: `parameters_of` them before the engine.
    """
    named = {name: each for name, each in branches.model.named_parameters() if not hasattr(each, "ds_id")}
    changed = {name: each for name, each in named.items() if each.dtype != before[name][0]}
    exact = {name: before[name][1] for name in changed if before[name][1] is not None}
    for name, parameter in changed.items():
        if name not in exact and hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            exact[name] = safe_get_full_fp32_param(parameter)
    yield
    for name, parameter in changed.items():
        parameter.data = exact.get(name, parameter.data).to(parameter.device, before[name][0])
