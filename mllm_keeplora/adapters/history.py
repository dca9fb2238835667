"""The past of a model: pristine base plus the stored factors of the domains learnt so far.

`merged` sums in float32 from the pristine weights and casts once. `factors` runs the past as one frozen branch beside
the base weights, because a cast of W + delta to bfloat16 destroys small updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.factors import Factors
from mllm_keeplora.models.partition import SavedParameter, assign, copy_of

if TYPE_CHECKING:
    from torch import Tensor


def choose_history(mode: str, model: Any) -> str:
    """Resolve `auto`: `merged` where the compute weights are float32 and not quantised, else `factors`."""
    import torch

    if mode != "auto":
        return mode
    quantised = getattr(model, "is_quantized", False)
    return "merged" if not quantised and next(model.parameters()).dtype == torch.float32 else "factors"


def weight_of(module: Any) -> Tensor:
    """Give the weight (d_out, d_in) of a linear layer, wrapped by peft or not; a quantised one is unpacked.

    A weight that ZeRO-3 divides comes as a whole copy, for which all processes must ask at the same time.
    """
    from peft.utils.integrations import dequantize_module_weight

    plain = getattr(module, "base_layer", module)
    if hasattr(plain.weight, "ds_id"):
        return copy_of(plain.weight)
    if type(plain.weight).__name__ == "Int8Params":  # peft's way moves the weight and so loses its scales on a CPU
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = plain.weight.SCB if plain.weight.SCB is not None else plain.state.SCB
        return int8_vectorwise_dequant(plain.weight.data, scales)
    return dequantize_module_weight(plain)


def summed(start: Tensor, deltas: Iterable[Tensor]) -> Tensor:
    """Add deltas to a tensor one after the other, in float32."""
    total = start.detach().float()
    for delta in deltas:
        total = total + delta.to(total.device)
    return total


def deltas_of(layer: str, history: list[Factors]) -> Iterator[Tensor]:
    """Give the delta weights (d_out, d_in) of a layer's branches in order; never all at once, which may be many GB."""
    return (factors.delta(layer) for factors in history if layer in factors.A)


def merge_for_good(model: Any, history: list[Factors], full: list[dict[str, Tensor]]) -> None:
    """Add everything learnt to a model's weights, summed in float32 and cast once; there is no way back.

    Args:
        model: the pristine base, not wrapped and not quantised.
        history, full: branches, and deltas of parameters trained in full, in order.
    """
    for layer in dict.fromkeys(layer for factors in history for layer in factors.A):
        weight = model.get_submodule(layer).weight
        weight.data.copy_(summed(weight, deltas_of(layer, history)))
    for name in full[0] if full else ():
        parameter = model.get_parameter(name)
        parameter.data.copy_(summed(parameter, (deltas[name] for deltas in full)))


class PristineWeights:
    """Untouched copies of the weights that a history changes, and the way back to any point of it.

    Of a weight that ZeRO-3 divides, each process keeps a copy of its part; every method is then collective.

    Args:
        model: the base model, unwrapped.
        layers, parameters: names of the target layers (for `merged`), and of parameters that are trained in full.
    """

    def __init__(self, model: Any, layers: tuple[str, ...], parameters: tuple[str, ...]):
        self.model = model
        self.weights = {layer: SavedParameter(model.get_submodule(layer).weight) for layer in layers}
        self.parameters = {name: SavedParameter(model.get_parameter(name)) for name in parameters}

    def merge(self, history: list[Factors]) -> None:
        """Set every target weight to pristine + sum of deltas: summed in float32, in order, cast once."""
        for layer, pristine in self.weights.items():
            assign(self.model.get_submodule(layer).weight, summed(pristine.whole(), deltas_of(layer, history)))

    def shift(self, deltas: list[dict[str, Tensor]]) -> None:
        """Set every fully trained parameter to pristine + sum of its deltas."""
        for name, pristine in self.parameters.items():
            assign(self.model.get_parameter(name), summed(pristine.whole(), (delta[name] for delta in deltas)))

    def shifted(self, before: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Give what training added to the fully trained parameters beyond `before`: float32 deltas on the CPU."""
        deltas = {}
        for name, pristine in self.parameters.items():
            start = summed(pristine.whole(), (delta[name] for delta in before))
            deltas[name] = (copy_of(self.model.get_parameter(name)).float() - start).cpu()
        return deltas


def split_at_break_even(past: Factors) -> tuple[Factors, dict[str, Tensor]]:
    """Part layers whose summed rank is worth its factors from those that a dense float32 delta (d_out, d_in) serves.

    A product by factors costs rank (d_in + d_out), a dense one d_in d_out.
    """
    dense, few = {}, []
    for layer, A in past.A.items():
        d_in, d_out = A.shape[1], past.B[layer].shape[0]
        if A.shape[0] * (d_in + d_out) > d_in * d_out:
            dense[layer] = past.delta(layer)
        else:
            few.append(layer)
    return Factors(*({layer: each[layer] for layer in few} for each in (past.A, past.B, past.alpha))), dense


def add_dense(module: Any, delta: Tensor) -> Any:
    """Add x delta^T, a float32 product, to a linear layer's output; give the handle that takes it off."""
    import torch.nn.functional as F

    delta = delta.to(module.weight.device)

    def hook(module: Any, args: tuple, output: Tensor) -> Tensor:
        return output + F.linear(args[0].to(delta.dtype), delta).to(output.dtype)

    return module.register_forward_hook(hook)
