"""Read a base's config, processor and model: whatever transformers reads of a base, it reads here.

A base may come from anywhere, so none of the code that it brings is run unless the config says so, no pickle is read,
and whatever a library makes of a broken file ends in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log

TRUST = "base.trust_remote_code"
COUNTS = re.compile(r"(layers?|depths?|blocks|experts)$")  # keys of a config that say how many modules are built
DEPTHS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth"}
MOST = 4096  # of any of them
GENERATIVE = "AutoModelForImageTextToText"


def read_config(location: str, trusted: bool = False, **hub: Any) -> Any:
    """Read a base's config.

    Args:
        location: folder or hub id.
        trusted: whether code that the base brings is run.
        hub: arguments of a hub's base, such as its revision.

    Raises:
        UserError: it is missing, broken, of an unknown kind or needs code that is not trusted.
    """
    from transformers import AutoConfig

    with reading(f"base {location}: its config", trusted):
        if Path(location).is_dir():
            refuse_absurd_counts(Path(location) / "config.json")
        return AutoConfig.from_pretrained(location, trust_remote_code=trusted, **hub)


def read_processor(location: str, trusted: bool = False, **hub: Any) -> Any:
    """Read a base's processor: its tokenizer, what prepares pictures, and the chat template."""
    from transformers import AutoProcessor

    with reading(f"base {location}: its processor", trusted):
        processor = AutoProcessor.from_pretrained(location, trust_remote_code=trusted, **hub)
        if getattr(processor, "tokenizer", None) is None:
            raise ValueError(f"it has no tokenizer, but is a {type(processor).__name__} alone")
        # transformers takes one of its own in silence, which need not make the same tokens.
        kind, named = type(processor.tokenizer).__name__, _own_tokenizers(processor.tokenizer)
        if named and not trusted and kind.removesuffix("Fast") not in named:
            raise ValueError(f"the tokenizer {named[0]} needs trust_remote_code")
        return processor


def _own_tokenizers(tokenizer: Any) -> list[str]:
    """Name the classes of a tokenizer's own code that its files ask for."""
    asked = (tokenizer.init_kwargs.get("auto_map") or {}).get("AutoTokenizer") or []
    several = [asked] if isinstance(asked, str) else asked
    return [str(each).split(".")[-1].removesuffix("Fast") for each in several if each]


def read_generation(location: str, **hub: Any) -> Any | None:
    """Read a base's generation config; None of one that has none."""
    from transformers import GenerationConfig

    with reading(f"base {location}: its generation config", False):
        try:
            return GenerationConfig.from_pretrained(location, **hub)
        except OSError:
            if (Path(location) / "generation_config.json").is_file():
                raise
            return None


def read_model(
    location: str, trusted: bool = False, auto: str = GENERATIVE, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Read a base's model by the class of transformers that is named by `auto`.

    Also give which of its weights were missing, of another shape, or not expected.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    told = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would tell in a table, callers tell in a sentence
    try:
        with reading(f"base {location}", trusted):
            return getattr(transformers, auto).from_pretrained(
                location,
                trust_remote_code=trusted,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told, as those that are missing
                output_loading_info=True,
                **settings,
            )
    except UserError as error:
        if "use_safetensors=True" in str(error):
            raise UserError(f"base {location} has no safetensors; {converter(location, auto)}") from error
        raise
    finally:
        transformers_logging.set_verbosity(told)


def skeleton(location: str, dtype: Any = None, trusted: bool = False, auto: str = GENERATIVE) -> Any:
    """Build the model without its weights: every module in place, on the meta device. Needs the config alone.

    Args:
        location, dtype: folder or hub id; torch dtype of its parameters, None for the checkpoint's.
        trusted: whether code that the base brings is run.
        auto: as in `read_model`.

    Raises:
        UserError: the config is not on this machine, is broken, or needs code that is not trusted.
    """
    import torch
    import transformers

    config = read_config(location, trusted, local_files_only=not Path(location).is_dir())
    with reading(f"base {location}: the model that its config describes", trusted), torch.device("meta"):
        kind = dtype or config.dtype
        return getattr(transformers, auto).from_config(config, dtype=kind, trust_remote_code=trusted)


def converter(location: str, auto: str = GENERATIVE) -> str:
    """Tell how weights become safetensors."""
    return (
        "pickles are not read; write them as safetensors into a new folder beside copies of the other files: "
        f"{auto}.from_pretrained({location!r}, use_safetensors=False).save_pretrained(NEW)"
    )


@contextmanager
def reading(what: str, trusted: bool) -> Iterator[None]:
    """Let transformers neither run a base's own code nor ask on standard input whether to, unless it is trusted.

    Args:
        what: is read, for the sentence about whatever is raised meanwhile.
        trusted: whether code of the base's own is run.

    Raises:
        UserError: something is broken, or needs code of the base's own.
    """
    from transformers import dynamic_module_utils

    if trusted:
        warn_once(f"{what.partition(':')[0]}: code that it brings is RUN on this machine, since {TRUST} is true")
    # Not every call in there passes on that code is not trusted. One that does not would ask, but for this.
    waits, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of whatever kind: the files may hold anything
        if "trust_remote_code" in str(error) and not trusted:
            raise UserError(
                f"{what} needs code that comes with it, which is not run; read it, and set {TRUST} to true if you "
                "trust it"
            ) from error
        if _is_ours(error):
            raise
        raise UserError(f"{what} cannot be loaded: {said(error)}") from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = waits


def said(error: Exception) -> str:
    """Give what any library's error says in one line, after the error's name where that alone says little."""
    text = " ".join(str(error).split())
    text = text if len(text) < 400 else f"{text[:400]} ..."
    return text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"


def _is_ours(error: Exception) -> bool:
    """Whether an error tells nothing of the files: no memory is left on a GPU, or processes lost another."""
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    lost = isinstance(error, RuntimeError) and is_deepspeed_zero3_enabled()  # only then processes meet while they load
    return lost or isinstance(error, torch.OutOfMemoryError)


@cache
def warn_once(text: str) -> None:
    """Warn of a base that is looked at several times."""
    log.warning("%s", text)


def refuse_absurd_counts(path: Path) -> None:
    """Refuse a config by which a model would be built without end, or without a layer.

    Raises:
        UserError: it is not readable JSON, holds no keys, or says so.
    """
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, got {type(values).__name__}")
    for key, value in _counts(values):
        least = 1 if key.split(".")[-1] in DEPTHS else -MOST
        if not least <= value <= MOST:
            raise UserError(f"{path}: {key} is {value}, which is no base that can be built; allowed: 1 to {MOST}")


def _counts(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{prefix}{key}.")
        elif COUNTS.search(key):
            several = value if isinstance(value, list) else [value]
            yield from ((f"{prefix}{key}", each) for each in several if type(each) is int)
