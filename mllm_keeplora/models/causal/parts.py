"""Name the parts of an MLLM: language model, vision tower, projector, and the linear layers that get an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.models.layers import block_of, chosen, linears

ALL_LINEARS = "language_linears"
PROJECTORS = ("multi_modal_projector", "connector", "visual.merger", "vision_projection", "mm_projector")
MORE_TOWERS = ("video_tower",)  # Video-LLaVA's, for clips alone
MORE_PROJECTORS = ("visual.deepstack_merger_list",)  # of features from inside the tower, beside the projector


@dataclass(frozen=True)
class Parts:
    """Exact module names within the loaded model.

    Attributes:
        projectors: every module between vision tower and language model, the main one first.
        language_layers, projector_layers: linear layers that get adapters; the projector's only if `keeplora` says so.
        other_towers: vision towers beside that of pictures, frozen like it.
    """

    language_model: str
    vision_tower: str
    projectors: tuple[str, ...]
    language_layers: tuple[str, ...]
    projector_layers: tuple[str, ...]
    other_towers: tuple[str, ...] = ()

    @property
    def target_layers(self) -> tuple[str, ...]:
        """The linear layers that get an adapter."""
        return self.language_layers + self.projector_layers

    def tower(self, layer: str) -> str | None:
        """Give the name of the tower that a target layer belongs to; None for the projector's."""
        return "language" if layer in self.language_layers else None

    def depth(self, layer: str) -> int | None:
        """Give the index of the transformer layer that a target layer belongs to; None for the projector's."""
        return block_of(layer, self.language_model) if layer in self.language_layers else None


def name_parts(model: Any, projector: str, target: str | Sequence[str] = ALL_LINEARS) -> Parts:
    """Resolve the parts once, from the loaded model (or from its skeleton without weights).

    Args:
        model: a transformers image-text-to-text model.
        projector: `keeplora` adapts the projector's linear layers, `full` and `frozen` do not.
        target: `language_linears`, or names of the language model's layers: the end of a dotted name (`q_proj`,
            `self_attn.q_proj`, found in every block or not at all) or a pattern over whole names (`*.layers.1?.*`).

    Raises:
        UserError: a part is missing; a name or pattern finds no linear layer, or a plain name finds one in some blocks
            only; the language model has expert weights that are no linear layers and `target` leaves them in.
    """
    names = {id(module): name for name, module in model.named_modules()}
    language = names.get(id(model.get_decoder()), "")
    tower = names.get(id(model.get_encoder("image")), "")
    mm_projector = next(_named(names.values(), PROJECTORS), "")
    for part, name in (("language model", language), ("vision tower", tower), ("projector", mm_projector)):
        if not name:
            raise UserError(f"{type(model).__name__} has no {part} that can be named; it is not a LLaVA-style MLLM")
    head = names.get(id(model.get_output_embeddings()))
    layers = tuple(name for name in linears(model, language) if name != head)
    if not layers:
        raise UserError(f"the language model {language} of {type(model).__name__} has no linear layer to adapt")
    if target != ALL_LINEARS:
        layers = chosen(layers, language, target)
    elif experts := expert_weights(model, language):
        raise UserError(
            f"{experts[0]} and {len(experts) - 1} more hold a mixture's experts in one tensor, which gets no adapters; "
            "name the layers to adapt, e.g. adapters.target=[q_proj, k_proj, v_proj, o_proj], or by patterns (*.q_proj)"
        )
    projectors = (mm_projector, *_named(names.values(), MORE_PROJECTORS))
    adapted = projectors if projector == "keeplora" else ()
    projector_layers = tuple(layer for each in adapted for layer in linears(model, each))
    others = tuple(name for name in _named(names.values(), MORE_TOWERS) if name != tower)
    return Parts(language, tower, projectors, layers, projector_layers, others)


def projectors_of(model: Any) -> list[Any]:
    """Give the modules that take in what the vision tower gives; of a list of modules each for itself."""
    return [model.get_submodule(name) for name in projector_names(model)]


def projector_names(model: Any) -> list[str]:
    """Give the exact names of `projectors_of`."""
    import torch

    modules, found = dict(model.named_modules()), []
    for name in _named(modules, PROJECTORS + MORE_PROJECTORS):
        is_list = isinstance(modules[name], torch.nn.ModuleList)
        found += [f"{name}.{number}" for number in range(len(modules[name]))] if is_list else [name]
    return found


def summary_of(model: Any, parts: Parts) -> list[str]:
    """Tell of each part in a line, with the kinds of target layers, their number and shapes (d_out, d_in)."""

    def kinds(layers: Sequence[str]) -> str:
        named = ((layer.rsplit(".", 1)[-1], model.get_submodule(layer)) for layer in layers)
        counts = Counter((kind, module.out_features, module.in_features) for kind, module in named)
        return ", ".join(f"{count} {kind} {d_out} x {d_in}" for (kind, d_out, d_in), count in counts.items())

    return [
        f"language model  {parts.language_model}: {kinds(parts.language_layers)}",
        f"projector       {', '.join(parts.projectors)}: {kinds(parts.projector_layers) or 'no adapters'}",
        f"vision tower    {', '.join((parts.vision_tower, *parts.other_towers))}: frozen",
    ]


def _named(names: Iterable[str], ends: tuple[str, ...]) -> Iterator[str]:
    return (name for name in names if any(f".{name}".endswith(f".{end}") for end in ends))


def expert_weights(model: Any, language: str) -> list[str]:
    """Name weights with three dimensions, other than those of convolutions: a mixture's experts in one tensor."""
    from torch.nn.modules.conv import _ConvNd

    found = []
    for name, module in model.get_submodule(language).named_modules():
        own = module.named_parameters(recurse=False) if not isinstance(module, _ConvNd) else ()
        found += [".".join(filter(None, (language, name, each))) for each, weight in own if weight.ndim == 3]
    return found
