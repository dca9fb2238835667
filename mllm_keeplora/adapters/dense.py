"""A long past as one dense float32 delta a layer: cheaper than its factors once their ranks add up past break-even."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor


def split_at_break_even(past: Factors) -> tuple[Factors, dict[str, Tensor]]:
    """Layers whose summed rank is worth its factors, and the dense deltas (d_out, d_in) float32 of the others.

    A product by factors costs rank (d_in + d_out), a dense one d_in d_out.
    """
    dense = {}
    for layer, A in past.A.items():
        d_in, d_out = A.shape[1], past.B[layer].shape[0]
        if A.shape[0] * (d_in + d_out) > d_in * d_out:
            dense[layer] = past.delta(layer)
    few = [layer for layer in past.A if layer not in dense]
    kept = ({layer: each[layer] for layer in few} for each in (past.A, past.B, past.alpha))
    return Factors(*kept), dense


class DenseDeltas:
    """Adds x delta^T, a float32 product, to the output of linear layers until it is removed.

    Args:
        model: the base model, not wrapped.
        deltas: layer by exact name -> (d_out, d_in) float32.
    """

    def __init__(self, model: Any, deltas: dict[str, Tensor]):
        self._handles = []
        for layer, delta in deltas.items():
            module = model.get_submodule(layer)
            self._handles.append(module.register_forward_hook(self._adding(delta.to(module.weight.device))))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _adding(delta: Tensor):
        import torch.nn.functional as F

        def hook(module: Any, args: tuple, output: Tensor) -> Tensor:
            return output + F.linear(args[0].to(delta.dtype), delta).to(output.dtype)

        return hook
