"""Where a base is and how it is prompted: by shipped name, folder or hub id."""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from mllm_keeplora.config import BaseConfig, find_config, read_yaml, shipped
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.models.causal.templates import STYLES
from mllm_keeplora.system import files

NOTES = "mllm_keeplora.json"  # in an exported folder: how its model was prompted
PACKAGE, CACHE = "package:", "cache:"  # what a shipped base's path is relative to


def resolve(config: BaseConfig) -> str:
    """Where the weights are: a folder or a hub id.

    Raises:
        UserError: the name is neither shipped, a folder, nor of the form owner/name; a prompt style that this version
            does not know; a library that is not installed.
    """
    location = resolve_path(config.model)
    if prompt_style(config) not in {"chat_template", *STYLES}:
        raise UserError(
            f"base.prompt {prompt_style(config)!r} is not known; allowed: auto, chat_template, {known(STYLES)}"
        )
    if config.quantization is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"base.quantization {config.quantization!r} needs bitsandbytes: pip install 'mllm-keeplora[quant]'"
        )
    if config.attn == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError(
            "base.attn 'flash_attention_2' needs the package flash-attn, which is not installed; sdpa is the default"
        )
    return location


def resolve_path(model: str) -> str:
    """Folder or hub id of a base by shipped name, folder or hub id.

    Raises:
        UserError: it is none of these, or a shipped one that has yet to be made.
    """
    settings = read_yaml(find_config("models", model)) if model in shipped("models") else {"path": model}
    location = settings["path"]
    if location.startswith(PACKAGE):
        location = str(resources.files("mllm_keeplora") / location.removeprefix(PACKAGE))
    if location.startswith(CACHE):
        location = str(files.cache_folder() / location.removeprefix(CACHE))
        if not Path(location).is_dir():
            raise UserError(f"base.model {model!r} has yet to be made: {settings['made_by']}")
    if not Path(location).is_dir() and (location.count("/") != 1 or location.startswith((".", "/"))):
        raise UserError(
            f"base.model {model!r} is neither a shipped base ({known(shipped('models'))}), nor a folder, "
            "nor a hub id of the form owner/name"
        )
    return location


def prompt_style(config: BaseConfig) -> str:
    """How the base is prompted: as asked for, as its folder or YAML says (also by hub id), else by its own template."""
    if config.prompt != "auto":
        return config.prompt
    told = Path(config.model) / NOTES
    if told.is_file():
        return files.read_json(told)["prompt"]
    return _shipped_prompts().get(config.model, "chat_template")


@cache
def _shipped_prompts() -> dict[str, str]:
    """Prompt styles by the names and by the paths of shipped bases."""
    found = {}
    for name in shipped("models"):
        settings = read_yaml(find_config("models", name))
        found |= dict.fromkeys((name, settings["path"]), settings.get("prompt", "chat_template"))
    return found
