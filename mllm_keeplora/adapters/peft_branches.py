"""Named low-rank branches on a base model's linear layers, as peft runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.factors import peft_settings
from mllm_keeplora.models.partition import assign

if TYPE_CHECKING:
    from torch import Tensor


class PeftBranches:
    """A base model and peft's model around it, which is there while it has a branch.

    Args:
        base: the base model; its target layers are wrapped in place.
    """

    def __init__(self, base: Any):
        self.base = base
        self.peft: Any = None

    def add(
        self, name: str, A: dict[str, Tensor], B: dict[str, Tensor], alpha: dict[str, float], dropout: float = 0.0
    ) -> None:
        """Add a branch, float32 whatever the base is, beside those that run already; without B it starts at zero."""
        from peft import LoraConfig, PeftModel

        if not A:
            return
        ranks = {layer: tensor.shape[0] for layer, tensor in A.items()}
        config = LoraConfig(**peft_settings(ranks, alpha, dropout) | {"inference_mode": False})
        if self.peft is None:
            self.peft = PeftModel(self.base, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        device = next(self.base.parameters()).device
        for layer in ranks:
            module = self.base.get_submodule(layer)
            module.lora_A[name].float().to(device)
            module.lora_B[name].float().to(device)
        self.peft.base_model.set_adapter(list(self.peft.peft_config))
        self.fill(name, A, B)

    def fill(self, name: str, A: dict[str, Tensor], B: dict[str, Tensor]) -> None:
        """Set a branch's factors; an empty B stands for zeros."""
        import torch

        for layer, tensor in A.items():
            assign(self.factor(name, "A", layer), tensor)
            assign(self.factor(name, "B", layer), B[layer] if B else torch.zeros(()))

    @contextmanager
    def only(self, names: list[str]) -> Iterator[None]:
        """Run some of the branches alone; without any, the base. What requires a gradient is the same afterwards."""
        trained = {name for name, parameter in self.peft.named_parameters() if parameter.requires_grad}
        if names:
            self.peft.base_model.set_adapter(names)
        else:
            self.peft.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter(list(self.peft.peft_config))
            for name, parameter in self.peft.named_parameters():
                parameter.requires_grad_(name in trained)

    def unload(self) -> None:
        """Take every branch off."""
        if self.peft is not None:
            self.base = self.peft.unload()
            self.peft = None

    def factor(self, name: str, part: str, layer: str) -> Any:
        """Give a branch's A or B, as a parameter."""
        return getattr(self.base.get_submodule(layer), f"lora_{part}")[name].weight
