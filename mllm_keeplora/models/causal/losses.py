"""Losses of a causal model: which positions predict a supervised token, and the cross entropy there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


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


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of `token_losses` over each sample's supervised tokens: (b,) float32."""
    losses, rows = token_losses(logits, labels), supervised_positions(labels)[0]
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    return losses.new_zeros(labels.shape[0]).index_add(0, rows, losses) / counts
