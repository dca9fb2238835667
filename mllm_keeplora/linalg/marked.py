"""Entries of a product B A that are marked, as bits, and a penalty on them, without ever holding the product.

A is (r, d_in), B (d_out, r). Marks are bytes (planes, d_out, ceil(d_in / 8)), bit i of a byte for the i-th of eight
entries; an entry's weight is the binary number that the planes spell, lowest first. All walk over chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .checks import full_precision

ENTRIES = 2**22  # of a chunk


def mark_largest(A: Tensor, B: Tensor, count: int, entries: int = ENTRIES) -> Tensor:
    """Mark the entries of B A with the largest absolute values, of equal ones the first.

    Args:
        A, B: (r, d_in) and (d_out, r).
        count: how many entries.
        entries: of a chunk; beside it `count` values are held, and the marks.

    Returns:
        (d_out, ceil(d_in / 8)) uint8.
    """
    A, B = A.detach().float(), B.detach().float()
    with full_precision(A.device):
        top = A.new_empty(0)
        for rows in _chunks(A, B, entries):
            top = torch.cat([top, (B[rows] @ A).abs().flatten()])
            top = top.topk(min(count, len(top)), sorted=False).values
        least = top.min() if count else A.new_tensor(float("inf"))
        equal, marks = count - int((top > least).sum()), []
        for rows in _chunks(A, B, entries):
            sizes = (B[rows] @ A).abs()
            ties = sizes == least
            ties &= (ties.flatten().cumsum(0) <= equal).view_as(ties)
            equal -= int(ties.sum())
            marks.append(_packed(ties | (sizes > least)))
        return torch.cat(marks)


def count_marks(marks: Tensor | None, new: Tensor, repeated: bool) -> Tensor:
    """Add one to the weight of newly marked entries; unless `repeated`, an entry counts once."""
    if marks is None:
        return new.unsqueeze(0)
    if not repeated:
        return marks | new
    planes = []
    for plane in marks:
        planes.append(plane ^ new)
        new = plane & new  # carried
    return torch.stack([*planes, new] if new.any() else planes)


def marked_entries(marks: Tensor) -> int:
    """Count the entries that are marked, however often."""
    ones = torch.tensor([number.bit_count() for number in range(256)], device=marks.device)
    return int(ones[reduce(torch.bitwise_or, marks).int()].sum())


def marked_mean(A: Tensor, B: Tensor, marks: Tensor, entries: int = ENTRIES) -> Tensor:
    """Average |B A| over marked entries by their weights; differentiable in A and B.

    With S = sign(B A) times the weights over their sum, the gradients are S^T B and S A^T in the factors' layout; they
    are formed with the value, and nothing else is kept for the backward pass. At 0 the sign is 0.

    Args:
        A, B: (r, d_in) and (d_out, r).
        marks: on the same device.
        entries: of a chunk.

    Returns:
        A scalar, float32; 0 where nothing is marked.
    """
    return _MarkedMean.apply(A, B, marks, entries)


class _MarkedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, marks: Tensor, entries: int) -> Tensor:
        ctx.dtypes = A.dtype, B.dtype
        A, B = A.float(), B.float()
        with full_precision(A.device):
            value, total = A.new_zeros((), dtype=torch.float64), A.new_zeros((), dtype=torch.float64)
            dA, dB = torch.zeros_like(A), torch.zeros_like(B)
            for rows in _chunks(A, B, entries):
                weights, product = _unpacked(marks[:, rows], A.shape[1]), B[rows] @ A
                S = product.sign() * weights
                total += weights.sum(dtype=torch.float64)
                value += (S * product).sum(dtype=torch.float64)
                dA += B[rows].mT @ S
                dB[rows] = S @ A.mT
            total.clamp_(min=1)
            ctx.save_for_backward(dA / total, dB / total)
            return (value / total).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dA, dB = ctx.saved_tensors
        return (gradients[0] * dA).to(ctx.dtypes[0]), (gradients[0] * dB).to(ctx.dtypes[1]), None, None


def _chunks(A: Tensor, B: Tensor, entries: int) -> Iterator[slice]:
    step = max(1, entries // A.shape[1])
    return (slice(start, start + step) for start in range(0, len(B), step))


def _packed(marked: Tensor) -> Tensor:
    """Bits (rows, d_in) as bytes (rows, ceil(d_in / 8))."""
    bits = torch.nn.functional.pad(marked, (0, -marked.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits * (1 << torch.arange(8, device=bits.device))).sum(dim=2).to(torch.uint8)


def _unpacked(marks: Tensor, d_in: int) -> Tensor:
    """Weights (rows, d_in) float32 of entries."""
    places = torch.arange(8, dtype=torch.uint8, device=marks.device)
    weights = 0.0
    for number, plane in enumerate(marks):
        weights = weights + ((plane.unsqueeze(2) >> places) & 1).flatten(1)[:, :d_in].float() * 2**number
    return weights
