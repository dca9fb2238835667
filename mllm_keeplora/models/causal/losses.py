"""What carries loss in a causal model: tokens by kind, logits at answers alone, cross entropy, where a graph starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.causal.parts import projectors_of
from mllm_keeplora.models.running import frozen_for_a_while, removed_afterwards

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


def media_tokens(config: Any) -> tuple[int, ...]:
    """Name the tokens that stand for patches of pictures and clips, by their ids."""
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def is_any_of(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Mark the places of some tokens."""
    import torch

    return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))


def token_kinds(batch: Mapping[str, Tensor], media: Sequence[int]) -> dict[str, Tensor]:
    """Mark all tokens but padding by their kind: those of pictures, of answers, and the rest, the instruction.

    Args:
        batch: `attention_mask` (b, t); `input_ids` where there are such tokens; `labels` where there are answers.
        media: tokens that stand for patches of pictures and clips, which count as pictures.
    """
    real = batch["attention_mask"].bool()
    image = answer = real & False
    if media:
        image = is_any_of(batch["input_ids"], media) & real
    if "labels" in batch:
        answer = (batch["labels"] != IGNORED) & real
    return {"image": image, "answer": answer, "instruction": real & ~image & ~answer}


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find rows and positions (n,) whose logits predict a label of (b, t): the place before each supervised token."""
    rows, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows, positions


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the next-token cross entropy of every supervised token.

    Args:
        logits: (b, t, vocabulary), or (1, n, vocabulary) at the supervised positions alone (`supervised_logits`).
        labels: (b, t) token ids, -100 where there is no loss.

    Returns:
        (n,) float32, row by row, and the row of each, (n,).
    """
    import torch.nn.functional as F

    rows, positions = supervised_positions(labels)
    chosen = logits[rows, positions] if logits.shape[:2] == labels.shape else logits.flatten(0, 1)  # a view both ways
    return F.cross_entropy(chosen.float(), labels[rows, positions + 1], reduction="none"), rows


@contextmanager
def supervised_logits(model: Any, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model compute the logits of supervised positions only: (1, n, vocabulary), in the order of the labels.

    The product with the vocabulary is a fifth of a small model's time, and answers are a few of many tokens.

    Args:
        model: transformers model; what it gives is not shifted.
        batch: `labels` (b, t) are token ids, -100 where there is no loss; position i is predicted at i - 1.
    """
    labels = batch["labels"]
    rows, positions = supervised_positions(labels)

    def select(module: Any, args: tuple) -> tuple:
        assert args[0].shape[:2] == labels.shape, f"logits of {tuple(args[0].shape[:2])}, labels {tuple(labels.shape)}"
        return (args[0][rows, positions].unsqueeze(0), *args[1:])

    with removed_afterwards([model.get_output_embeddings().register_forward_pre_hook(select)]):
        yield


def passing(model: Any, gradients: bool = False) -> AbstractContextManager:
    """Prepare a model for a data pass, see `Family.passing`."""
    return graph_from_inputs(model) if gradients else without_logits(model)


@contextmanager
def without_logits(model: Any) -> Iterator[None]:
    """Spare the product with the vocabulary where a pass looks at layers alone: logits are (1, 0, vocabulary)."""

    def select(module: Any, args: tuple) -> tuple:
        return (args[0][:1, :0], *args[1:])

    with removed_afterwards([model.get_output_embeddings().register_forward_pre_hook(select)]):
        yield


@contextmanager
def graph_from_inputs(model: Any) -> Iterator[None]:
    """Make the graph start at the embeddings and at the images, since no parameter requires a gradient."""

    def start_graph(module: Any, args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    def start_at_input(module: Any, args: tuple) -> tuple:
        # what a projector receives from the frozen tower must start a graph for its own weights' gradients
        return (args[0].detach().requires_grad_(True), *args[1:])

    handles = [model.get_input_embeddings().register_forward_hook(start_graph)]
    handles += [module.register_forward_pre_hook(start_at_input) for module in projectors_of(model)]
    with frozen_for_a_while(model), removed_afterwards(handles):
        yield
