"""Compute the frozen vision tower once per picture: later passes over the same picture find what it gave.

Pictures are known by the bytes of their pixel values, so gradient, train, feature and evaluation passes share a store.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.causal.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 8  # pictures per forward of the tower, always filled up: what a picture gives never depends on its company
DEFAULT_MEBIBYTES = 512  # on a CPU; on a GPU the tower is a small part of a step and the pictures are large


class TowerCache:
    """Stand before a frozen vision tower's `forward` and keep its outputs, least recently used first to go.

    The `forward` is replaced until `remove`; kept outputs take at most `capacity` bytes.
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
        """Give the tower's output for (b, channels, height, width) pixels; anything else goes to it as it is."""
        import torch
        from torch.utils import _pytree

        is_plain = torch.is_tensor(pixel_values) and pixel_values.ndim == 4 and not args
        # what has a place for each picture of a batch, a tensor or a list, is no setting
        has_settings = all(value is None or isinstance(value, bool | int | str) for value in options.values())
        # nothing trains and nothing is partitioned: then no process waits for another inside the tower
        is_busy = any(each.requires_grad or hasattr(each, "ds_id") for each in self.tower.parameters())
        if not is_plain or not has_settings or is_busy:
            return self._forward(pixel_values, *args, **options)

        # pictures are looked up by their bytes, under all that changes what the tower gives
        device = pixel_values.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        call = (tuple(pixel_values.shape[1:]), pixel_values.dtype, precision, repr(sorted(options.items())))
        rows = (row.contiguous().view(torch.uint8).cpu().numpy() for row in pixel_values)
        keys = [(call, hashlib.blake2b(row, digest_size=16).digest()) for row in rows]
        found = {key: self._rows[key] for key in keys if key in self._rows}
        missing = {key: position for position, key in enumerate(keys) if key not in found}
        if missing and not self._compute(pixel_values, missing, call, options, found):
            return self._forward(pixel_values, **options)
        for key in found:
            if key in self._rows:
                self._rows.move_to_end(key)

        # outputs of single pictures are put together as the tower gives them
        spec, order = self._specs[call]
        stacked = [torch.stack(parts) for parts in zip(*(found[key] for key in keys), strict=True)]
        return _pytree.tree_unflatten([None if place is None else stacked[place] for place in order], spec)

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
                found[key] = self._rows[key] = [leaf[row].clone() for leaf in unique.values()]
                self.bytes += sum(tensor.nbytes for tensor in found[key])
                while self.bytes > self.capacity:
                    _, oldest = self._rows.popitem(last=False)
                    self.bytes -= sum(tensor.nbytes for tensor in oldest)
        self.computed += len(keys)
        return True


def cache_tower(base: Any, mebibytes: int | None) -> TowerCache | None:
    """Keep the outputs of a loaded `Base`'s vision tower, of at most so many mebibytes; of two towers half each.

    None for these means 512 on a CPU and nothing on a GPU. No cache is made where nothing is to be kept, where the
    tower learns, or where it draws random numbers (dropout).
    """
    if not isinstance(base.parts, Parts):
        return None
    tower = base.model.get_submodule(base.parts.vision_tower)
    if mebibytes is None:
        mebibytes = DEFAULT_MEBIBYTES if next(tower.parameters()).device.type == "cpu" else 0
    if mebibytes == 0 or any("drop" in name and value for name, value in tower.config.to_dict().items()):
        return None
    others = [base.model.get_submodule(name) for name in base.parts.other_towers]
    kept = (mebibytes << 20) // (1 + len(others))
    for each in others:
        TowerCache(each, kept)
    return TowerCache(tower, kept)
