"""Name the parts of an MLLM: language model, vision tower, projector, and the linear layers that get an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_keeplora.errors import UserError

PROJECTORS = ("multi_modal_projector", "connector", "visual.merger", "vision_projection", "mm_projector")


@dataclass(frozen=True)
class Parts:
    """Exact module names within the loaded model."""

    language_model: str
    vision_tower: str
    mm_projector: str
    language_layers: tuple[str, ...]
    projector_layers: tuple[str, ...]

    @property
    def target_layers(self) -> tuple[str, ...]:
        """Every linear layer that gets an adapter; the projector's are empty unless its mode is `keeplora`."""
        return self.language_layers + self.projector_layers

    def depth(self, layer: str) -> int | None:
        """Index of the transformer layer that a target layer belongs to; None for the projector's."""
        if layer not in self.language_layers:
            return None
        numbers = [part for part in layer.removeprefix(self.language_model).split(".") if part.isdigit()]
        return int(numbers[0]) if numbers else None


def name_parts(model: Any, projector: str) -> Parts:
    """Resolve the parts once, from the loaded model.

    Args:
        model: a transformers image-text-to-text model.
        projector: `keeplora` adapts the projector's linear layers, `full` and `frozen` do not.

    Raises:
        UserError: a part is missing.
    """
    import torch

    names = {id(module): name for name, module in model.named_modules()}
    language = names.get(id(model.get_decoder()), "")
    tower = names.get(id(model.get_encoder("image")), "")
    mm_projector = next((n for n in names.values() for p in PROJECTORS if n == p or n.endswith(f".{p}")), "")
    for part, name in (("language model", language), ("vision tower", tower), ("projector", mm_projector)):
        if not name:
            raise UserError(f"{type(model).__name__} has no {part} that can be named; it is not a LLaVA-style MLLM")

    def linears(parent: str) -> tuple[str, ...]:
        return tuple(
            name
            for name, module in model.named_modules()
            if name.startswith(f"{parent}.") and isinstance(module, torch.nn.Linear)
        )

    head = names.get(id(model.get_output_embeddings()))
    layers = tuple(name for name in linears(language) if name != head)
    if not layers:
        raise UserError(f"the language model {language} of {type(model).__name__} has no linear layer to adapt")
    return Parts(language, tower, mm_projector, layers, linears(mm_projector) if projector == "keeplora" else ())
