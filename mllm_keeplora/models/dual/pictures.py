"""Whether the pictures that a base's processor makes are of the size that its image tower takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import files

NESTED, ALONE = "processor_config.json", "preprocessor_config.json"  # where a processor's image part is stored


def refuse_other_size(processor: Any, config: Any) -> None:
    """Refuse a processor whose pictures have another size than an image tower of patches has places for.

    Nothing is said of towers of convolutions, which take any size, and where either file leaves its size open.

    Raises:
        UserError: both are told and differ.
    """
    vision, images = getattr(config, "vision_config", None), getattr(processor, "image_processor", None)
    side = getattr(vision, "image_size", None)
    wanted = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    made = _made(images)
    if not getattr(vision, "patch_size", None) or None in wanted or made in (None, wanted):
        return
    location = processor.tokenizer.name_or_path
    raise UserError(
        f"base {location}: its processor makes pictures of {made[0]} x {made[1]} ({_file_of(location)}), but its image "
        f"tower takes {wanted[0]} x {wanted[1]} alone (vision_config.image_size in config.json)"
    )


def _made(images: Any) -> tuple[int, int] | None:
    """Height and width of every picture that is made; None where they depend on the picture or are not told."""
    crops, resizes = (getattr(images, name, False) for name in ("do_center_crop", "do_resize"))
    box = getattr(images, "crop_size" if crops else "size", None) if crops or resizes else None
    sides = tuple(box.get(name) for name in ("height", "width")) if hasattr(box, "get") else (None, None)
    return sides if all(type(side) is int for side in sides) else None


def _file_of(location: str) -> str:
    """Name the file that tells how pictures are prepared: transformers prefers the nested one."""
    nested = Path(location) / NESTED
    return NESTED if nested.is_file() and "image_processor" in files.read_json(nested) else ALONE
