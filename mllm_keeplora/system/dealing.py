"""Deal pieces of work out to processes, each done by one alone, and give every result to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mllm_keeplora.system.distributed import device, gather, rank, world_size

S, T = TypeVar("S"), TypeVar("T")


def dealt(costs: Mapping[str, float], load: Callable[[str], S], work: Callable[[str, S], T]) -> dict[str, T]:
    """Do a piece of work for every name, each by one process alone, and give every result to all.

    Args:
        costs: what each piece takes, in any unit; large ones are dealt out first.
        load: name -> what is worked on. Called by all processes at the same time, since a weight that is divided over
            them comes together only then; each keeps its own alone.
        work: gives tensors, or a nested structure of tensors and plain values.
    """
    if world_size() == 1:
        return {name: work(name, load(name)) for name in costs}
    import torch
    from torch.utils._pytree import tree_map_only

    order = sorted(costs, key=lambda name: -costs[name])
    owners = {name: place % world_size() for place, name in enumerate(order)}
    own: dict[str, T] = {}
    for start in range(0, len(order), world_size()):
        mine = None
        for name in order[start : start + world_size()]:
            source = load(name)
            mine = (name, source) if owners[name] == rank() else mine
        if mine is not None:
            own[mine[0]] = work(*mine)
    # Every process first hears the shapes of all results: it has to make room before their tensors are broadcast.
    shares = gather({name: tree_map_only(torch.Tensor, _Outline.of, result) for name, result in own.items()})
    outlines = {name: each for share in shares for name, each in share.items()}
    return {name: _handed_out(own.get(name), outlines[name], owners[name]) for name in costs}


def _handed_out(result: Any, outline: Any, owner: int) -> Any:
    """The owner's result, its tensors broadcast one by one."""
    import torch
    import torch.distributed as dist
    from torch.utils._pytree import tree_flatten, tree_unflatten

    via_gpu = dist.get_backend() == "nccl"
    leaves, spec = tree_flatten(outline)
    held = tree_flatten(result)[0] if rank() == owner else leaves
    for place, (leaf, own) in enumerate(zip(leaves, held, strict=True)):
        if isinstance(leaf, _Outline):
            where = device() if leaf.on_gpu or via_gpu else "cpu"
            if rank() != owner:
                own = torch.empty(leaf.shape, dtype=leaf.dtype, device=where)
            own = own.to(where).contiguous()
            dist.broadcast(own, src=owner)
            leaves[place] = own if leaf.on_gpu else own.cpu()
    return tree_unflatten(leaves, spec)


@dataclass(frozen=True)
class _Outline:
    shape: tuple[int, ...]
    dtype: Any
    on_gpu: bool

    @classmethod
    def of(cls, tensor: Any) -> _Outline:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.is_cuda)
