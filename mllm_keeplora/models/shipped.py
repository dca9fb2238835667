"""Where a base is and how it is prompted: by shipped name, folder or hub id."""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from mllm_keeplora.config import BaseConfig, find_config, read_yaml, shipped
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.models.causal.templates import STYLES
from mllm_keeplora.system import files

NOTES = "mllm_keeplora.json"  # in an exported folder: how its model was prompted
PACKAGE, CACHE = "package:", "cache:"  # what a shipped base's path is relative to


class Notes(TypedDict):
    """What is read of `NOTES`."""

    prompt: str
    image_modes: NotRequired[list[str]]
    video: NotRequired[VideoOptions]
    clips: NotRequired[Literal["frames", "native"]]


class BaseSettings(TypedDict):
    """What the YAML of a shipped base says; the rest of it is for readers."""

    path: str
    prompt: NotRequired[str]
    family: NotRequired[str]
    made_by: NotRequired[str]


def resolve(config: BaseConfig) -> str:
    """Find the weights: a folder or a hub id.

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
    """Find the folder or hub id of a base by shipped name, folder or hub id.

    Raises:
        UserError: it is none of these, or a shipped one that has yet to be made.
    """
    settings = settings_of(model)
    location = settings.get("path", model)
    if location.startswith(PACKAGE):
        location = str(resources.files("mllm_keeplora") / location.removeprefix(PACKAGE))
    if location.startswith(CACHE):
        location = str(files.cache_folder() / location.removeprefix(CACHE))
        if not Path(location).is_dir():
            raise UserError(
                f"base.model {model!r} has yet to be made: {settings.get('made_by', 'its YAML does not say how')}"
            )
    if not Path(location).is_dir() and (location.count("/") != 1 or location.startswith((".", "/"))):
        raise UserError(
            f"base.model {model!r} is neither a shipped base ({known(shipped('models'))}), nor a folder, "
            "nor a hub id of the form owner/name"
        )
    return location


def hub_id(model: str) -> str | None:
    """Give the hub id of a base, also where a folder of the hub's cache was named; None of any other folder."""
    location = resolve_path(model)
    if not Path(location).is_dir():
        return location
    parts = Path(location).resolve().parts  # models--OWNER--NAME/snapshots/REVISION
    is_snapshot = len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
    return "/".join(parts[-3].split("--")[1:]) if is_snapshot else None


def prompt_style(config: BaseConfig) -> str:
    """Say how a base is prompted: as asked for, as its folder or its YAML says, else by its own template."""
    if config.prompt != "auto":
        return config.prompt
    return notes_of(config.model).get("prompt") or settings_of(config.model).get("prompt", "chat_template")


def clip_input(config: BaseConfig) -> str:
    """Say how a base is shown clips: as asked for, as its folder says, else by its own input if it has one."""
    return config.video if config.video != "auto" else notes_of(config.model).get("clips", "auto")


def notes_of(folder: str | Path) -> dict[str, Any]:
    """Read how an exported model was prompted, by the keys of `Notes`; nothing of any other folder."""
    path = Path(folder) / NOTES
    return files.read_json(path, Notes) if path.is_file() else {}


def settings_of(model: str) -> BaseSettings | dict[str, str]:
    """Give what the YAML of a shipped base says, by the base's name or path; nothing of any other base."""
    return _shipped().get(model, {})


@cache
def _shipped() -> dict[str, BaseSettings]:
    found = {}
    for name in shipped("models"):
        path = find_config("models", name)
        settings = files.checked(path, BaseSettings, read_yaml(path))
        found |= dict.fromkeys((name, settings["path"]), settings)
    return found
