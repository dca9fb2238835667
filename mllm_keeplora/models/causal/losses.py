"""Tokens of a causal batch by their kind, which positions predict a supervised one, and the cross entropy there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


def token_kinds(batch: Mapping[str, Tensor], image_token: int | None) -> dict[str, Tensor]:
    """Mark all tokens but padding by their kind: those of pictures, of answers, and the rest, the instruction.

    Args:
        batch: `attention_mask` (b, t); `input_ids` where there is an image token; `labels` where there are answers.
        image_token: id of the token that stands for a picture's patch.
    """
    real = batch["attention_mask"].bool()
    image = answer = real & False
    if image_token is not None:
        image = (batch["input_ids"] == image_token) & real
    if "labels" in batch:
        answer = (batch["labels"] != IGNORED) & real
    return {"image": image, "answer": answer, "instruction": real & ~image & ~answer}


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and positions (n,), (n,) whose logits predict a label of (b, t): the place before each supervised token."""
    rows, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows, positions


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross entropy of every supervised token.

    Args:
        logits: (b, t, vocabulary), or (1, n, vocabulary) at the supervised positions alone (`supervised_logits`).
        labels: (b, t) token ids, -100 where there is no loss.

    Returns:
        (n,) float32, row by row.
    """
    import torch.nn.functional as F

    rows, positions = supervised_positions(labels)
    chosen = logits[rows, positions] if logits.shape[:2] == labels.shape else logits.flatten(0, 1)  # a view both ways
    return F.cross_entropy(chosen.float(), labels[rows, positions + 1], reduction="none")
