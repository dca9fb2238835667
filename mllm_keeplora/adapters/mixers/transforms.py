"""One domain's transform between A and B, and its softmax over the open B and those of earlier domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_keeplora.adapters.mixers.mixing import Mixer, module_name


class Transform(nn.Module):
    """A layer's part: y = sum_i softmax(logits / temperature)_i B_i transform A x, the open B last.

    Args:
        rank, d_out: of the layer's branch.
        earlier: number of fixed up-projections.
        temperature: of the softmax, which is float32.
        form: whether the transform is (rank, rank) or its diagonal; the identity at first.
    """

    def __init__(self, rank: int, d_out: int, earlier: int, temperature: float, form: Literal["full", "diag"]):
        super().__init__()
        self.temperature = temperature
        self.transform = nn.Parameter(torch.eye(rank) if form == "full" else torch.ones(rank))
        self.logits = nn.Parameter(torch.zeros(earlier + 1))
        self.register_buffer("earlier", torch.zeros(earlier, d_out, rank))

    @property
    def matrix(self) -> Tensor:
        return self.transform if self.transform.ndim == 2 else self.transform.diag()

    @property
    def shares(self) -> Tensor:
        """What each up-projection counts, (earlier + 1,) float32."""
        return torch.softmax(self.logits.float() / self.temperature, dim=0)

    def fixed(self) -> Tensor:
        """Sum the earlier up-projections by their shares, (d_out, rank)."""
        return torch.einsum("n,nor->or", self.shares[:-1], self.earlier.float())

    def turn(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        """Transform what A gives; a forward hook of `lora_A`."""
        return functional.linear(output, self.matrix.to(output.dtype))

    def mix(self, module: Any, args: tuple, output: Tensor) -> Tensor:
        """Add what earlier up-projections give; a forward hook of `lora_B`."""
        mixed = self.shares[-1].to(output.dtype) * output
        return mixed + functional.linear(args[0], self.fixed().to(args[0].dtype)) if len(self.earlier) else mixed


class Transforms(Mixer):
    """Transform and softmax of every target layer, trained with the branch; once folded, no mixer is needed.

    Args:
        sizes: target layer -> (rank, d_out).
        given: `earlier`, `temperature` and `form` as in `Transform`.
    """

    kind = "transforms"
    in_training_alone: ClassVar[bool] = True

    def __init__(self, sizes: dict[str, Sequence[int]], **given: Any):
        super().__init__()
        self.sizes, self.given = dict(sizes), given
        self.layers = nn.ModuleDict({module_name(layer): Transform(*size, **given) for layer, size in sizes.items()})

    def settings(self) -> dict[str, Any]:
        return {"sizes": self.sizes, **self.given}

    def layer(self, layer: str) -> Transform:
        """Give the part of a target layer."""
        return self.layers[module_name(layer)]

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> None:
        """Find nothing: all questions are of the one domain."""

    def attach(self, layer: str, down: Any, up: Any, first: int, ranks: Sequence[int]) -> list[Any]:
        part = self.layer(layer)
        return [down.register_forward_hook(part.turn), up.register_forward_hook(part.mix)]

    def folded(self, layer: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Give the (A, B) of plain LoRA that does what a layer's A and open B do; on the CPU."""
        with torch.no_grad():
            part = self.layer(layer)
            matrix, share, fixed = part.matrix.float().cpu(), part.shares[-1].cpu(), part.fixed().cpu()
            return matrix @ A, share * B + fixed
