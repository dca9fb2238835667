"""Losses of pictures, each by cross entropy over the classes that it may show.

    z = tau f(x) [g(text of class 1), ..., g(text of class C)]^T,        loss = -log softmax(z)[y]

with both towers f, g of unit length and tau frozen. SigLIP's bias moves all logits alike, and so no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.dual.parts import embeddings_of
from mllm_keeplora.models.running import frozen_for_a_while, removed_afterwards

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
HELD = "class_prototypes"  # a model's prototypes: modules by the digest of their class list, or under `OPEN`
OPEN = "domain"  # what trains now
FORBIDDEN = -1e4  # the logit of a class that a picture may not show: finite, so that no divergence is 0 times infinity


@contextmanager
def supervised_logits(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model give logits (1, n, C) of the pictures that carry loss."""
    carries, allowed, prototypes = batch["labels"] != IGNORED, batch.get("allowed"), held_by(model).get(OPEN)

    def narrow(module: Any, args: tuple, output: Any) -> None:
        logits = output.logits_per_image
        if prototypes is not None:
            logits = logits + prototypes(output.image_embeds)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, FORBIDDEN)
        output["logits"] = logits[carries][None]

    with removed_afterwards([model.register_forward_hook(narrow)]):
        yield


def held_by(model: Any) -> dict[str, Any]:
    """Give the prototypes that a model holds, by the digest of their class list, or under `OPEN`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft's
    return dict(getattr(base, HELD, {}))


def class_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross entropy of every picture that carries loss.

    Args:
        logits: (1, n, C), as under `supervised_logits`.
        labels: (b,) places of classes, -100 where there is no loss.

    Returns:
        (n,) float32, and the row of each, (n,).
    """
    import torch.nn.functional as F

    rows = (labels != IGNORED).nonzero().flatten()
    return F.cross_entropy(logits[0].float(), labels[rows], reduction="none"), rows


def passing(model: Any, gradients: bool = False) -> AbstractContextManager:
    """Prepare a model for a data pass, see `Family.passing`."""
    return _graph_from_inputs(model) if gradients else nullcontext()


@contextmanager
def _graph_from_inputs(model: Any) -> Iterator[None]:
    """Make the graph start at the pictures and at the texts' embeddings, since no parameter requires a gradient."""

    def start_at_pictures(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "pixel_values": kwargs["pixel_values"].detach().requires_grad_(True)}

    def start_at_texts(module: Any, args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft's
    handles = [
        base.register_forward_pre_hook(start_at_pictures, with_kwargs=True),
        embeddings_of(base).register_forward_hook(start_at_texts),
    ]
    with frozen_for_a_while(model), removed_afterwards(handles):
        yield


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Join two training batches; a class text that both have is there once.

    Args:
        first, second: of one base.
        pad: token id to fill texts up with.
    """
    import torch

    # texts of both, of one length, each once
    length = max(batch["input_ids"].shape[1] for batch in (first, second))
    filled = [
        {
            name: torch.nn.functional.pad(batch[name], (0, length - batch[name].shape[1]), value=value)
            for name, value in (("input_ids", pad), ("attention_mask", 0))
            if name in batch
        }
        for batch in (first, second)
    ]
    places: dict[tuple[int, ...], int] = {}
    own = [
        torch.tensor([places.setdefault(tuple(ids), len(places)) for ids in each["input_ids"].tolist()])
        for each in filled
    ]
    new = [place not in own[0] for place in own[1].tolist()]
    whole = {name: torch.cat([filled[0][name], filled[1][name][new]]) for name in filled[0]}

    # pictures one after the other; labels and what each picture may show by the places of all texts
    labels, allowed = [], []
    for batch, to in zip((first, second), own, strict=True):
        to = to.to(batch["labels"].device)
        carries = batch["labels"] != IGNORED
        labels.append(torch.where(carries, to[batch["labels"].clamp(min=0)], batch["labels"]))
        may = batch.get("allowed", batch["labels"].new_ones(len(batch["labels"]), len(to)).bool())
        allowed.append(may.new_zeros(len(may), len(places)).index_copy(1, to, may))
    whole |= {
        name: torch.cat([first[name], second[name]]) for name in first if name not in (*whole, "labels", "allowed")
    }
    whole["labels"] = torch.cat(labels)
    if not bool((both := torch.cat(allowed)).all()):
        whole["allowed"] = both
    return whole
