"""Name the parts of a dual encoder: its two towers, what lies between them and the cosine, the layers to adapt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.models.causal.parts import ALL_LINEARS
from mllm_keeplora.models.layers import block_of, chosen, linears, matches

TOWERS = {"vision": "vision_model", "text": "text_model"}
# What comes behind a tower, pictures first: projections (CLIP, ALIGN, Chinese-CLIP, AltCLIP), heads (SigLIP).
PROJECTORS = (
    "visual_projection",
    "vision_model.head",
    "text_projection",
    "text_model.head",
    "text_model.transformation",
)
OF_PICTURES = ("vision_model.", "visual_projection")
# What is adapted where `adapters.target` says nothing: the attention of every block, by CLIP's names and by BERT's.
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value", "attention.output.dense")


@dataclass(frozen=True)
class DualParts:
    """Exact module names within the loaded model.

    Attributes:
        tower_layers: of each tower, the linear layers of its blocks that get adapters.
        projectors: the modules between towers and cosine.
        projector_layers: their linear layers that get adapters; only if `adapters.projector` is `keeplora`.
    """

    tower_layers: dict[str, tuple[str, ...]]
    projectors: tuple[str, ...]
    projector_layers: tuple[str, ...]

    @property
    def target_layers(self) -> tuple[str, ...]:
        """The linear layers that get an adapter."""
        return (*chain.from_iterable(self.tower_layers.values()), *self.projector_layers)

    def tower(self, layer: str) -> str | None:
        """Name the tower of a target layer, `vision` or `text`; None for a projector's."""
        return next((tower for tower, layers in self.tower_layers.items() if layer in layers), None)

    def depth(self, layer: str) -> int | None:
        """Give the index of the block within its own tower that a target layer belongs to; None for a projector's."""
        tower = self.tower(layer)
        return None if tower is None else block_of(layer, TOWERS[tower])


def name_parts(model: Any, projector: str, target: str | Sequence[str] = ALL_LINEARS) -> DualParts:
    """Resolve the parts once, from the loaded model (or from its skeleton without weights).

    Args:
        model: a transformers zero-shot image classification model.
        projector: `keeplora` adapts the projectors' linear layers, `full` and `frozen` do not.
        target: names or patterns as for other bases; a name must be in every block of each tower that has it. The
            default, `language_linears`, means the projections of attention here.

    Raises:
        UserError: a tower is missing, or a name or pattern finds no linear layer.
    """
    names = {name for name, _ in model.named_modules()}
    for part, name in TOWERS.items():
        if name not in names:
            raise UserError(f"{type(model).__name__} has no {part} tower called {name}; it is not a CLIP-like base")
    having = {
        tower: tuple(layer for layer in linears(model, name) if block_of(layer, name) is not None)
        for tower, name in TOWERS.items()
    }
    everything = tuple(chain.from_iterable(having.values()))
    if target == ALL_LINEARS:
        target = [name for name in ATTENTION if any(matches(layer, name) for layer in everything)]
    for wanted in target:
        chosen(everything, "both towers", [wanted], whole=False)
    layers = {}
    for tower, name in TOWERS.items():
        own = [wanted for wanted in target if any(matches(layer, wanted) for layer in having[tower])]
        layers[tower] = chosen(having[tower], name, own)
    projectors = tuple(projector_names(model))
    adapted = projectors if projector == "keeplora" else ()
    return DualParts(layers, projectors, tuple(chain.from_iterable(linears(model, each) for each in adapted)))


def projector_names(model: Any) -> list[str]:
    """Name the modules between towers and cosine."""
    names = {name for name, _ in model.named_modules()}
    return [name for name in PROJECTORS if name in names]


def sees_pictures(layer: str) -> bool:
    """Tell whether a layer's rows are of pictures; else they are of texts."""
    return layer.startswith(OF_PICTURES)


def summary_of(model: Any, parts: DualParts) -> list[str]:
    """Tell of each part in a line, with the kinds of target layers, their number and shapes (d_out, d_in)."""

    def kinds(layers: Sequence[str]) -> str:
        named = ((layer.rsplit(".", 1)[-1], model.get_submodule(layer)) for layer in layers)
        counts = Counter((kind, module.out_features, module.in_features) for kind, module in named)
        return ", ".join(f"{count} {kind} {d_out} x {d_in}" for (kind, d_out, d_in), count in counts.items())

    told = {f"{tower} tower": (TOWERS[tower], layers) for tower, layers in parts.tower_layers.items()}
    told["projectors"] = (", ".join(parts.projectors), parts.projector_layers)
    return [f"{part:<15} {name}: {kinds(layers) or 'no adapters'}" for part, (name, layers) in told.items()]


def vocabulary_of(model: Any) -> int:
    """Give how many tokens the text tower has embeddings of."""
    return embeddings_of(model).num_embeddings


def embeddings_of(model: Any) -> Any:
    """Find the text tower's embeddings of tokens, which every tower has first."""
    from torch.nn import Embedding

    return next(each for each in model.get_submodule(TOWERS["text"]).modules() if isinstance(each, Embedding))
