"""What every function here asks of its tensors: shape, finite values, float32 or float64.

Knows no algebra. All refusals are `ValueError`s of one sentence: the thing, the value received, what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Device = torch.device | str


class NotFinite(ValueError):
    """A tensor holds NaN or infinity."""


def as_float(tensor: Tensor, name: str) -> Tensor:
    """Promote a tensor to the precision used inside: float64 stays, every other float becomes float32.

    Args:
        tensor: any shape, any floating dtype.
        name: what the tensor is called in messages.

    Returns:
        The same values, detached, float32 or float64; the tensor itself if nothing had to change.

    Raises:
        ValueError: not a tensor, not of a floating dtype, or it holds NaN or infinity.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
    tensor = tensor.detach()
    if tensor.dtype != torch.float64:
        tensor = tensor.to(torch.float32)
    if not math.isfinite(tensor.sum()):  # one pass; a NaN or infinity always shows in a sum, but so does an overflow
        count = int((~tensor.isfinite()).sum())
        if count:
            raise NotFinite(f"{name} must be finite, got {count} NaN or infinite values in shape {tuple(tensor.shape)}")
    return tensor


def as_matrix(tensor: Tensor, name: str, columns: int | None = None, rows: int | None = None) -> Tensor:
    """Promote like `as_float` and require two dimensions of the given sizes (None: any size)."""
    tensor = as_float(tensor, name)
    wanted = f"({'n' if rows is None else rows}, {'any' if columns is None else columns})"
    sizes_agree = tensor.dim() == 2 and rows in (None, tensor.shape[0]) and columns in (None, tensor.shape[1])
    if not sizes_agree:
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    return tensor


def as_count(value: int, name: str, least: int) -> int:
    """Return a whole number of at least `least`, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def as_share(value: float, name: str) -> float:
    """Return a share of energy in [0, 1] as a float, or raise ValueError."""
    value = float(value)
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def as_choice(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of `allowed`, or raise ValueError that lists them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep float32 products float32: no autocast (hooks run inside it) and no TF32, only for the block."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device_type=device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
