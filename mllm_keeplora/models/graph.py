"""What the graph of a forward saves, counted on tensors that have shapes and no content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.running import removed_afterwards

if TYPE_CHECKING:
    import torch


def counted_graph(part: Any, layers: Sequence[Any], run: Callable[[], Any]) -> tuple[int, list[int]]:
    """Run a part of a skeleton; it is no use afterwards.

    Args:
        part: module on the meta device.
        layers: linear layers within it.
        run: runs it, on tensors that it makes.

    Returns:
        Bytes of the storages that the graph saves beside the weights, and the widths of the layers' distinct inputs.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, int] = {}
    inputs: dict[int, int] = {}
    kept: list[Any] = []  # held, so that no identity is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def look(module: Any, args: tuple) -> None:
        kept.append(args[0])
        inputs[id(args[0])] = module.in_features

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    with FakeTensorMode(allow_non_fake_inputs=True), removed_afterwards(handles):
        part.to_empty(device="cpu").requires_grad_(False)
        weights = {tensor.untyped_storage()._cdata for tensor in part.state_dict(keep_vars=True).values()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    return sum(saved.values()), list(inputs.values())
