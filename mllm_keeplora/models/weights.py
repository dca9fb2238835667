"""What the weight files of a base's folder must hold, and what a model must have got of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.models.reading import GENERATIVE, converter, read_generation, read_model, skeleton, warn_once
from mllm_keeplora.system import files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
PACKED = 16  # most numbers that one stored number may stand for, where weights are stored quantised
HARMLESS = ("position_ids", "inv_freq")  # of older checkpoints: they follow from the config


@lru_cache(8)
def refuse_unfit(folder: Path, trusted: bool, known_as: str | None, auto: str = GENERATIVE) -> None:
    """Refuse a base whose weights do not fill the model that its config describes, before a weight is read.

    Args:
        folder: of the base.
        trusted: whether code that the base brings is run.
        known_as: its fingerprint: one that was found to fit is not tried again.
        auto: name of the class of transformers that loads it.

    Raises:
        UserError: weights are pickled, damaged, missing or of other shapes, or the config describes a larger model.
    """
    stored = stored_numbers(folder, auto)
    read_generation(str(folder))  # a broken one would be passed over, and with it the tokens that end an answer
    model = skeleton(str(folder), trusted=trusted, auto=auto)
    packed = getattr(model.config, "quantization_config", None) is not None
    wanted, found = sum(each.numel() for each in model.parameters()), sum(count for _, count in stored.values())
    if wanted > found * (PACKED if packed else 2):  # a few are told by name; so many would not fit into memory
        raise UserError(
            f"base {folder}: config.json describes a model of {wanted:,} numbers, the weight files hold {found:,}; "
            "they do not belong together"
        )
    if not packed:  # what is stored quantised is loaded only where it can run
        model, told = read_model(str(folder), trusted, auto, device_map="meta", attn_implementation="eager")
        refuse_unfilled(str(folder), told)


def stored_numbers(folder: Path, auto: str = GENERATIVE) -> dict[str, tuple[Path, int]]:
    """Tell of every tensor of a base's folder in which file it is, and how many numbers it has.

    Raises:
        UserError: the folder holds an adapter, only pickles, a damaged file, or an index that does not fit its files.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"base folder {folder} holds an adapter (adapter_config.json), which would be loaded with it unseen; keep "
            "it in a folder of its own"
        )
    found: dict[str, tuple[Path, int]] = {}
    names, index = _weight_files(folder, auto)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name}, which is not in its folder")
        for tensor, count in _numbers(folder / name):
            if tensor in found:
                raise UserError(f"base folder {folder}: tensor {tensor} is in {found[tensor][0].name} and in {name}")
            found[tensor] = folder / name, count
    for tensor, name in index.items():
        if tensor not in found or found[tensor][0].name != name:
            raise UserError(f"{folder / INDEX} says that {name} has the tensor {tensor}, which it has not")
    return found


def _weight_files(folder: Path, auto: str) -> tuple[list[str], dict[str, str]]:
    """Name the weight files of a folder, and give what its index says of each tensor, if it has one."""
    named = files.read_json(folder / "config.json")
    if isinstance(named, dict) and named.get("transformers_weights") not in (None, WEIGHTS, INDEX):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights is {named['transformers_weights']!r}; allowed: {WEIGHTS}"
        )
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if (folder / INDEX).is_file():
        told = files.read_json(folder / INDEX)
        index = told.get("weight_map") if isinstance(told, dict) else None
        if not isinstance(index, dict) or not index or not isinstance(told.get("metadata", {}), dict):
            raise UserError(f"{folder / INDEX} must map tensors to files in weight_map, and names none")
        for name in index.values():
            if not (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")):
                raise UserError(f"{folder / INDEX} names {name!r}; allowed: *.safetensors in the same folder")
        return sorted(set(index.values())), index
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(f"base folder {folder} has its weights in {pickles[0]} alone; {converter(str(folder), auto)}")
    raise UserError(f"base folder {folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    """Read the header of a safetensors file, which is compared with the file's size meanwhile."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, math.prod(stored.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def refuse_unfilled(base: str, told: dict[str, Any]) -> None:
    """Refuse a model of which weights were missing or of other shapes, so that random numbers stand there.

    Args:
        base: of the model, for the sentence.
        told: what `read_model` says of the weights.

    Raises:
        UserError: with the first names. Weights that have no place in the model are a warning.
    """
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"base {base}: its files lack {_some(missing)}, which the model that its config describes has")
    if misfits := sorted(told["mismatched_keys"], key=str):
        name, stored, wanted = misfits[0]
        raise UserError(
            f"base {base}: {name} is stored as {tuple(stored)}, by its config it is {tuple(wanted)}"
            + (f", and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else "")
        )
    if extra := sorted(name for name in told["unexpected_keys"] if not name.endswith(HARMLESS)):
        warn_once(f"base {base}: no part of the model has a place for {_some(extra)} of its files")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more weights" if len(names) > 3 else "")


def refuse_not_finite(base: str, location: str, model: Any) -> None:
    """Refuse a model that holds nan or inf, which would spread into all that is learnt.

    Args:
        base, location: as it is called, and the folder or hub id that it was read from.
        model: just loaded.

    Raises:
        UserError: with the layer, and the file's tensor.
    """
    import torch

    for name, tensor in model.state_dict(keep_vars=True).items():
        own = getattr(tensor, "ds_tensor", tensor).detach()  # under ZeRO-3 a process has its share
        is_weight = own.is_floating_point() and own.itemsize > 1 and own.numel() > 0
        if is_weight and not torch.stack(torch.aminmax(own)).isfinite().all():
            raise UserError(f"base.model {base!r}: {name} holds nan or inf{_where(location)}")


def _where(location: str) -> str:
    """Tell which stored tensor is not finite, where that can be found."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    folder = Path(cached_file(location, "config.json", local_files_only=True)).parent
    for name, (path, _) in stored_numbers(folder).items():
        with safe_open(path, "pt") as stored:
            if not stored.get_tensor(name).isfinite().all():
                return f" ({path}: tensor {name})"
    return ""


def refuse_small_vocabulary(base: str, processor: Any, size: int | None) -> None:
    """Refuse a tokenizer that makes tokens beyond a model's embeddings.

    Args:
        base, processor: as it is called, and as it was read.
        size: how many tokens the model has embeddings of; None if that is not known.

    Raises:
        UserError: with both numbers.
    """
    highest = max(processor.tokenizer.get_vocab().values(), default=0)
    if size is not None and highest >= size:
        raise UserError(
            f"base {base}: its tokenizer has tokens up to number {highest}, the model embeddings of the first {size}"
        )
