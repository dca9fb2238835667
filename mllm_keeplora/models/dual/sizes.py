"""What a dual encoder takes in passes, counted on its skeleton: both towers run on shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.dual.parts import TOWERS, DualParts, embeddings_of
from mllm_keeplora.models.family import Sizes
from mllm_keeplora.models.graph import counted_graph

if TYPE_CHECKING:
    import torch

TEXT = 16  # tokens of a class's text


def sizes_of(model: Any, parts: DualParts, dtype: torch.dtype) -> Sizes:
    """Run both towers' skeletons on shapes alone; they are no use afterwards.

    A record's tokens are the patches of its picture, as `patches` counts them; the texts of classes come once a batch.
    """
    import torch

    towers = {tower: model.get_submodule(name) for tower, name in TOWERS.items()}
    layers = {tower: [model.get_submodule(name) for name in names] for tower, names in parts.tower_layers.items()}
    vision, words = model.config.vision_config, embeddings_of(model)

    def see() -> None:
        side = vision.image_size
        towers["vision"](pixel_values=torch.zeros(1, 3, side, side, dtype=dtype, requires_grad=True))

    def read() -> None:
        def start(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output.requires_grad_(True)

        handle = words.register_forward_hook(start)
        towers["text"](input_ids=torch.zeros(1, TEXT, dtype=torch.long))
        handle.remove()

    seen, widths = counted_graph(towers["vision"], layers["vision"], see)
    said, more = counted_graph(towers["text"], layers["text"], read)
    return Sizes(
        saved=seen / patches(model.config),
        input_widths=(*widths, *more, *(model.get_submodule(name).in_features for name in parts.projector_layers)),
        blocks=max(len({parts.depth(name) for name in names}) for names in parts.tower_layers.values()),
        width=getattr(vision, "hidden_size", 0),
        loss=0.0,
        cached=0.0,
        text=said,
    )


def patches(config: Any) -> int:
    """Count the rows that a picture takes in its tower; 1 where a config does not tell."""
    side, patch = (getattr(config.vision_config, name, 0) for name in ("image_size", "patch_size"))
    return (side // patch) ** 2 + 1 if side and patch else 1
