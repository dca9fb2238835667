"""Gates over branches: one small network for each branch says from the question how much of the branch takes part.

A gate looks at what frozen parts see in the question (`features`). Its weight is one number for all layers and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_keeplora.adapters.mixers.mixing import Mixer
from mllm_keeplora.linalg import Basis, MomentAccumulator, moment_rows

GATE_LAYERS = ("down", "up", "key")  # G_1, G_2, G_3
COSINE_SCALE = 4.0


class Gate(nn.Module):
    """Weigh a question by a small network.

    p_1 = silu(G_1 p_0), p_2 = silu(G_2 p_1), a = |2 sigmoid(b) - 1| with b = G_3 p_2, or 4 times their cosine.

    Args:
        d, width: sizes of p_0 and p_1.
        head: how b comes about. A cosine limits a to 0.964.

    Source: GainLoRA (NeurIPS 2025), section 4; the cosine is that of its code.
    """

    def __init__(self, d: int, width: int, head: Literal["cosine", "dot"]):
        super().__init__()
        self.head = head
        self.down = nn.Parameter(torch.zeros(width, d))
        self.up = nn.Parameter(torch.zeros(d, width))
        self.key = nn.Parameter(torch.zeros(1, d))

    def begin(self, rng: torch.Generator) -> None:
        """Start all layers as plain linear ones: uniform within 1 / sqrt(inputs)."""
        for layer in (self.down, self.up, self.key):
            layer.data = (torch.rand(layer.shape, generator=rng) * 2 - 1) / math.sqrt(layer.shape[1])

    def inputs(self, questions: Tensor) -> dict[str, Tensor]:
        """Give what each layer receives: p_0 (n, d) as given, p_1 (n, width), p_2 (n, d), float32."""
        p_1 = functional.silu(functional.linear(questions, self.down.float()))  # weights may be bf16 under DeepSpeed
        p_2 = functional.silu(functional.linear(p_1, self.up.float()))
        return {"down": questions, "up": p_1, "key": p_2}

    def forward(self, questions: Tensor) -> Tensor:
        """Give weights (n,) in [0, 1] of questions p_0 (n, d) float32."""
        p_2, key = self.inputs(questions)["key"], self.key.float()
        if self.head == "cosine":
            b = COSINE_SCALE * functional.cosine_similarity(p_2, key)
        else:
            b = functional.linear(p_2, key).squeeze(1)
        return (2 * torch.sigmoid(b) - 1).abs()


class Gates(Mixer):
    """One gate for each branch; the newest can be trained, the earlier ones are fixed.

    Args:
        parts, d, width, head: number of gates, and what each of them is.
        words: how many of the d features are of words; the others are of pictures.
        rate: learning rate of the gates as a multiple of the run's.
    """

    kind = "gates"

    def __init__(self, parts: int, d: int, width: int, head: Literal["cosine", "dot"], words: int, rate: float = 1.0):
        super().__init__()
        self.d, self.width, self.head, self.words, self.rate = d, width, head, words, rate
        self.gates = nn.ModuleList(Gate(d, width, head) for _ in range(parts))
        self.gates[:-1].requires_grad_(False)

    def settings(self) -> dict[str, Any]:
        names = ("d", "width", "head", "words", "rate")
        return {"parts": len(self.gates), **{name: getattr(self, name) for name in names}}

    @property
    def newest(self) -> Gate:
        return self.gates[-1]

    def grown(self) -> Gates:
        """Copy the gates and add one, which begins as the newest of these."""
        found = Gates(**{**self.settings(), "parts": len(self.gates) + 1})
        for new, old in zip(found.gates, [*self.gates, self.newest], strict=True):
            new.load_state_dict(old.state_dict())
        return found

    def forward(self, questions: Tensor) -> Tensor:
        """Give weights (n, parts) of questions p_0 (n, d)."""
        return torch.stack([gate(questions) for gate in self.gates], dim=1)

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> Tensor:
        """Give weights (b, parts) float32, the same whatever autocast the model runs under."""
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            features = self.family.question_features(model, batch, pictures=self.words < self.d)
            return self(balanced(features, self.words))


def balanced(features: Tensor, words: int) -> Tensor:
    """Make the pictures' part of features (n, d) as long as that of words, which it would drown otherwise.

    Words come first, `words` of them; pictures are zero where there are none.
    """
    said, seen = features[:, :words], features[:, words:]
    return torch.cat([said, functional.normalize(seen) * said.norm(dim=1, keepdim=True)], dim=1)


def informed_key(key: Tensor, memory: Basis, inputs: MomentAccumulator) -> Tensor | None:
    """Find a key outside of the memory that hears a new domain's questions; None if all of them is remembered.

    Args:
        key: (1, d), whose length it takes.
        memory, inputs: of the inputs p_2 of earlier domains; moments C of the new domain's.

    Returns:
        (1, d): the leading left singular vector of (I - M M^T) C.

    Source: the code of GainLoRA (get_reg_matrix).
    """
    found = memory.missing(moment_rows(inputs), 1.0, reference="residual", limit=1)
    return found.mT.to(key) * key.norm() if found.shape[1] else None


def constrained(values: Tensor, before: Tensor, memory: Basis, row_renorm: bool) -> Tensor:
    """Take the change of a gate's layer since `before` out of the memory of its inputs.

    G_before + (G - G_before) (I - M M^T). Because this keeps what G_before has inside the memory, it does not matter
    whether it is the value before the step or before the domain.

    Args:
        values, before: (rows, d).
        row_renorm: make rows as long again as they were before the projection, which lets remembered inputs leak.

    Source: GainLoRA (NeurIPS 2025), update constraint; the lengths are those of its code.
    """
    result = values.float() - memory.project(values.float() - before.float())
    if row_renorm:
        result = functional.normalize(result) * values.float().norm(dim=1, keepdim=True)
    return result
