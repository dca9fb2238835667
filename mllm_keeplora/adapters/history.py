"""The past of a model: pristine base plus the stored factors of the domains learnt so far.

`merged` sums in float32 from the pristine weights and casts once. `factors` runs the past as one frozen branch beside
the base weights, because a cast of W + delta to bfloat16 destroys small updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.factors import Factors
from mllm_keeplora.models.partition import Kept, assign, copy_of

if TYPE_CHECKING:
    from torch import Tensor


def choose_history(mode: str, model: Any) -> str:
    """`auto` is `merged` where the compute weights are float32, `factors` otherwise and for quantised weights."""
    import torch

    if mode != "auto":
        return mode
    quantised = getattr(model, "is_quantized", False)
    return "merged" if not quantised and next(model.parameters()).dtype == torch.float32 else "factors"


def weight_of(module: Any) -> Tensor:
    """Weight (d_out, d_in) of a linear layer, wrapped by peft or not; of a quantised one what it stands for.

    Where ZeRO-3 divides it, a whole copy (all processes must ask for it at the same time).
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


def merge_for_good(model: Any, history: list[Factors], full: list[dict[str, Tensor]]) -> None:
    """Add everything learnt to a model's weights, summed in float32 and cast once; there is no way back.

    Args:
        model: the pristine base, not wrapped and not quantised.
        history: branches in order.
        full: deltas of parameters trained in full, in order.
    """
    for layer in dict.fromkeys(layer for factors in history for layer in factors.A):
        weight = model.get_submodule(layer).weight
        total = weight.detach().float()
        for factors in history:
            if layer in factors.A:
                total = total + factors.delta(layer).to(total.device)
        weight.data.copy_(total)
    for name in full[0] if full else ():
        parameter = model.get_parameter(name)
        total = parameter.detach().float()
        for deltas in full:
            total = total + deltas[name].to(total.device)
        parameter.data.copy_(total)


class PristineWeights:
    """Untouched copies of the weights that a history changes, and the way back to any point of it.

    Of a weight that ZeRO-3 divides, each process keeps a copy of its part; every method is then collective.

    Args:
        model: the base model, unwrapped.
        layers: names of the target layers (for `merged`).
        parameters: names of whole parameters that are trained in full (the projector's, if so configured).
    """

    def __init__(self, model: Any, layers: tuple[str, ...], parameters: tuple[str, ...]):
        self.model = model
        self.weights = {layer: Kept(model.get_submodule(layer).weight) for layer in layers}
        self.parameters = {name: Kept(model.get_parameter(name)) for name in parameters}

    def merge(self, history: list[Factors]) -> None:
        """Set every target weight to pristine + sum of deltas: summed in float32, in order, cast once."""
        for layer, pristine in self.weights.items():
            total = pristine.whole().float()
            for factors in history:
                if layer in factors.A:
                    total = total + factors.delta(layer).to(total.device)
            assign(self.model.get_submodule(layer).weight, total)

    def shift(self, deltas: list[dict[str, Tensor]]) -> None:
        """Set every fully trained parameter to pristine + sum of its deltas."""
        for name, pristine in self.parameters.items():
            total = pristine.whole().float()
            for delta in deltas:
                total = total + delta[name].to(total.device)
            assign(self.model.get_parameter(name), total)

    def shifted(self, before: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What training added to the fully trained parameters beyond `before`: float32 deltas on the CPU."""
        deltas = {}
        for name, pristine in self.parameters.items():
            start = pristine.whole().float()
            for delta in before:
                start = start + delta[name].to(start.device)
            deltas[name] = (copy_of(self.model.get_parameter(name)).float() - start).cpu()
        return deltas
