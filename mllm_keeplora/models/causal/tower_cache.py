"""Compute the frozen vision tower once per picture: later passes over the same picture find what it gave.

Pictures are known by the bytes of their pixel values, so gradient, train, feature and evaluation passes share a store.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 8  # pictures per forward of the tower, always filled up: what a picture gives never depends on its company
DEFAULT_MEBIBYTES = 512  # on a CPU; on a GPU the tower is a small part of a step and the pictures are large


class TowerCache:
    """Stands before a vision tower's `forward` and keeps its outputs, least recently used first to go.

    Args:
        tower: the frozen vision tower; its `forward` is replaced until `remove`.
        capacity: bytes that the kept outputs may take.
    """

    def __init__(self, tower: Any, capacity: int):
        self.tower = tower
        self.capacity = capacity
        self.bytes = 0
        self.computed = 0
        self._rows: OrderedDict[tuple, list[Tensor]] = OrderedDict()
        self._specs: dict[tuple, tuple] = {}
        self._forward = tower.forward
        tower.forward = self.forward

    def remove(self) -> None:
        """Give the tower its own `forward` back and forget every output."""
        self.tower.forward = self._forward
        self._rows.clear()
        self.bytes = 0

    def forward(self, pixel_values: Any = None, *args: Any, **options: Any) -> Any:
        """The tower's output for (b, channels, height, width) pixels; anything else goes to the tower as it is."""
        import torch

        plain = torch.is_tensor(pixel_values) and pixel_values.ndim == 4 and not args
        if not plain or not all(map(_is_setting, options.values())) or not self._is_frozen():
            return self._forward(pixel_values, *args, **options)
        device = pixel_values.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        call = (tuple(pixel_values.shape[1:]), pixel_values.dtype, precision, repr(sorted(options.items())))
        keys = [(call, _digest(row)) for row in pixel_values]
        found = {key: self._rows[key] for key in keys if key in self._rows}
        missing = {key: position for position, key in enumerate(keys) if key not in found}
        if missing and not self._compute(pixel_values, missing, call, options, found):
            return self._forward(pixel_values, **options)
        for key in found:
            if key in self._rows:
                self._rows.move_to_end(key)
        return _assemble([found[key] for key in keys], *self._specs[call])

    def _compute(self, pixel_values: Tensor, missing: dict, call: tuple, options: dict, found: dict) -> bool:
        """Run the tower over the pictures that are missing; False if its output cannot be told apart by picture."""
        import torch
        from torch.utils import _pytree

        keys, positions = list(missing), list(missing.values())
        for start in range(0, len(keys), CHUNK):
            part = positions[start : start + CHUNK]
            filled = (part * CHUNK)[:CHUNK]
            with torch.inference_mode(False), torch.no_grad():
                leaves, spec = _pytree.tree_flatten(self._forward(pixel_values[filled].clone(), **options))
            if not all(leaf is None or (torch.is_tensor(leaf) and leaf.shape[:1] == (CHUNK,)) for leaf in leaves):
                return False
            unique = {id(leaf): leaf for leaf in leaves if leaf is not None}
            order = list(unique)
            self._specs[call] = (spec, [None if leaf is None else order.index(id(leaf)) for leaf in leaves])
            for row, key in enumerate(keys[start : start + CHUNK]):
                found[key] = [leaf[row].clone() for leaf in unique.values()]
                self._store(key, found[key])
        self.computed += len(keys)
        return True

    def _store(self, key: tuple, tensors: list[Tensor]) -> None:
        self._rows[key] = tensors
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        while self.bytes > self.capacity:
            _, oldest = self._rows.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in oldest)

    def _is_frozen(self) -> bool:
        """Nothing trains and nothing is partitioned: then no process waits for another inside the tower."""
        return not any(parameter.requires_grad or hasattr(parameter, "ds_id") for parameter in self.tower.parameters())


def cache_tower(base: Any, mebibytes: int | None) -> TowerCache | None:
    """Keep the outputs of a loaded base's vision tower.

    Args:
        base: a `Base`.
        mebibytes: how much to keep at most; 0 for nothing, None for 512 on a CPU and nothing on a GPU.

    Returns:
        The cache, or None where nothing is kept: by choice, or since the tower draws random numbers (dropout).
    """
    tower = base.model.get_submodule(base.parts.vision_tower)
    if mebibytes is None:
        mebibytes = DEFAULT_MEBIBYTES if next(tower.parameters()).device.type == "cpu" else 0
    if mebibytes == 0 or any("drop" in name and value for name, value in tower.config.to_dict().items()):
        return None
    return TowerCache(tower, mebibytes << 20)


def _is_setting(value: Any) -> bool:
    """An option that is the same for every picture of a batch: no tensor, no list with a place for each picture."""
    return value is None or isinstance(value, bool | int | str)


def _digest(row: Tensor) -> bytes:
    import torch

    return hashlib.blake2b(row.contiguous().view(torch.uint8).cpu().numpy(), digest_size=16).digest()


def _assemble(rows: list[list[Tensor]], spec: Any, order: list[int | None]) -> Any:
    """Outputs of single pictures put together as the tower gives them."""
    import torch
    from torch.utils import _pytree

    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return _pytree.tree_unflatten([None if place is None else stacked[place] for place in order], spec)
