"""The plain pipeline that the toolkit is measured against, written as the published code works, only in float32.

A full thin SVD of every matrix; full weight gradients in two copies (`.grad` and a running sum); two SVDs for an energy
decision (one for the total energy, one for the directions); features of every module for itself, all tokens stacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_keeplora.linalg import Basis


def rank_of(squares: Tensor, total: Tensor | float, covered: float, energy: float) -> int:
    """Smallest count that reaches the share; 0 if what is covered does already."""
    if covered >= energy:
        return 0
    return int((covered + squares.cumsum(0) / total < energy).sum()) + 1


def principal(weight: Tensor, energy: float) -> Tensor:
    """(d_in, p) by a full thin SVD of the weight."""
    _, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    squares = values.double().square()
    return right[: rank_of(squares, squares.sum(), 0.0, energy)].mT


def start(gradient: Tensor, columns: Tensor, rank: int) -> Tensor:
    """(rank, d_in) top right singular vectors of the residual gradient, by a full thin SVD."""
    residual = gradient - (gradient @ columns) @ columns.mT
    return torch.linalg.svd(residual, full_matrices=False)[2][:rank]


def grown(rows: Tensor, columns: Tensor, energy: float) -> Tensor:
    """Columns after growth by all tokens: an SVD for the total energy, another of the residual for the directions."""
    total = torch.linalg.svdvals(rows).double().square().sum()
    residual = rows - (rows @ columns) @ columns.mT
    _, values, right = torch.linalg.svd(residual, full_matrices=False)
    squares = values.double().square()
    covered = float(1 - squares.sum() / total)
    return torch.cat([columns, right[: rank_of(squares, total, covered, energy)].mT], dim=1)


def accumulate_gradients(model, layers: dict, loss_of, batches: list) -> dict[str, Tensor]:
    """Mean gradients through `.grad` of every weight and a running sum beside it."""
    sums: dict[str, Tensor] = {}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        loss_of(model, batch).backward()
        for name, layer in layers.items():
            sums[name] = layer.weight.grad.clone() if name not in sums else sums[name] + layer.weight.grad
            layer.weight.grad = None
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return {name: total / len(batches) for name, total in sums.items()}


def projector_difference(one: Tensor, other: Tensor) -> float:
    """Spectral norm of the difference of two orthogonal projectors; 1 if the ranks differ."""
    if one.shape[1] != other.shape[1]:
        return 1.0
    if one.shape[1] == 0:
        return 0.0
    outside = Basis.from_columns(one).residual(other.mT)
    return float(torch.linalg.matrix_norm(outside.double(), 2))
