"""What a domain teaches, as numbers: per target layer a pair (A, B) and a scale, kept in peft's own file format.

delta weight of a layer = alpha / rank * B A. Knows no strategy; files here are what plain peft loads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import FiniteFloat
from typing_extensions import NotRequired, TypedDict

from mllm_keeplora.adapters.mixers import read_mixer
from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.system import files

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.mixers.mixing import Mixer
    from mllm_keeplora.adapters.prototypes import Prototypes

PREFIX = "base_model.model."
MIXER, PROTOTYPES = "mixer|", "prototypes"


class Settings(TypedDict):
    """What is read here of peft's settings."""

    alpha_pattern: dict[str, FiniteFloat]


class PrototypeFacts(TypedDict):
    """What says which list of classes prototypes are for, and the scale of their logits."""

    classes: str
    scale: FiniteFloat


class BranchFacts(TypedDict):
    """What a branch's file says beside its tensors."""

    alpha: dict[str, FiniteFloat]
    train: list[Literal["A", "B"]]
    carried: NotRequired[bool]
    mixer: NotRequired[dict[str, Any] | None]
    prototypes: NotRequired[PrototypeFacts]


@dataclass
class Branch:
    """The start of a low-rank branch: A per layer, its scale, and which of A and B are trained.

    B starts at zero, or at `B[layer]` (d_out, rank), whose product is then taken off the base: opening a branch leaves
    the model's function as it was. `A[layer]` is (rank, d_in) float32; a layer without room for a direction has no
    entry. `alpha[layer]` is peft's: scaling = alpha / rank, with any layer scale g_l already inside.

    Attributes:
        carried: A and B are those of the domain before, trained on: the branch stands in place of the whole past.
        mixer: weighs this branch and those of the past, which then stay live; None where they are merged or summed.
        prototypes: of the domain's classes, which train beside the branch; None where there are none.
    """

    A: dict[str, Tensor]
    alpha: dict[str, float]
    train: tuple[str, ...] = ("B",)
    B: dict[str, Tensor] = field(default_factory=dict)
    carried: bool = False
    mixer: Mixer | None = None
    prototypes: Prototypes | None = None

    def __post_init__(self):
        assert self.A.keys() == self.alpha.keys(), "every layer of a branch needs A and alpha"
        assert not self.B or self.B.keys() == self.A.keys(), "B is given for every layer of a branch or for none"
        assert set(self.train) <= {"A", "B"} and self.train, self.train
        assert self.mixer is None or self.carried or not self.B, "a live branch begins with B = 0, or is carried"

    @property
    def ranks(self) -> dict[str, int]:
        return {layer: A.shape[0] for layer, A in self.A.items()}

    def save(self, path: Path) -> None:
        tensors = {f"{layer}.A": A for layer, A in self.A.items()} | {f"{layer}.B": B for layer, B in self.B.items()}
        facts = {"alpha": self.alpha, "train": self.train, "carried": self.carried, "mixer": None}
        if self.mixer is not None:
            facts["mixer"], stored = self.mixer.stored()
            tensors |= {f"{MIXER}{name}": tensor for name, tensor in stored.items()}
        if self.prototypes is not None:
            facts["prototypes"] = self.prototypes.facts()
            tensors[PROTOTYPES] = self.prototypes.P.detach()
        files.write_tensors(path, tensors, {"branch": json.dumps(facts)})  # safetensors keeps no order of keys

    @classmethod
    def load(cls, path: Path) -> Branch:
        tensors, facts = files.read_tensors(path), files.read_facts(path, "branch", BranchFacts)
        A = {layer: _tensor(path, tensors, f"{layer}.A") for layer in facts["alpha"]}
        B = {layer: tensors[f"{layer}.B"] for layer in facts["alpha"] if f"{layer}.B" in tensors}
        mixer = None
        if facts.get("mixer") is not None:
            own = {name.removeprefix(MIXER): each for name, each in tensors.items() if name.startswith(MIXER)}
            mixer = read_mixer(path, facts["mixer"], own)
        prototypes = None
        if (told := facts.get("prototypes")) is not None:
            from mllm_keeplora.adapters.prototypes import Prototypes

            prototypes = Prototypes(_tensor(path, tensors, PROTOTYPES), **told)
        return cls(A, facts["alpha"], tuple(facts["train"]), B, facts.get("carried", False), mixer, prototypes)


@dataclass
class Factors:
    """A trained branch: A (rank, d_in), B (d_out, rank), both float32 on the CPU, and alpha, for each layer.

    `weight` is what a later domain made of the branch's share, by layer where it is not 1 (SD-LoRA's magnitudes).
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    alpha: dict[str, float]
    weight: dict[str, float] = field(default_factory=dict)

    def scaling(self, layer: str) -> float:
        return self.alpha[layer] / self.A[layer].shape[0] * self.weight.get(layer, 1.0)

    def unweighted(self) -> Factors:
        """Give the branch as it was trained."""
        return Factors(self.A, self.B, self.alpha)

    def less(self, other: Factors) -> Factors:
        """Make a branch whose delta is this one's less the other's."""
        return concatenate([self, replace(other, B={layer: -B for layer, B in other.B.items()})])

    def delta(self, layer: str) -> Tensor:
        """Give the delta weight (d_out, d_in) in float32."""
        return self.scaling(layer) * (self.B[layer] @ self.A[layer])

    def save(self, folder: Path, dropout: float = 0.0) -> None:
        """Write peft's two files, read them back and check that every tensor is there, with its shape, and finite.

        Raises:
            RuntimeError: what was read back differs (an empty adapter must never pass for a trained one).
        """
        tensors = {f"{PREFIX}{layer}.lora_A.weight": A for layer, A in self.A.items()}
        tensors |= {f"{PREFIX}{layer}.lora_B.weight": B for layer, B in self.B.items()}
        files.write_json(folder / "adapter_config.json", peft_settings(self.ranks, self.alpha, dropout))
        files.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        stored = files.read_tensors(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if name not in stored or stored[name].shape != tensor.shape or not stored[name].isfinite().all():
                raise RuntimeError(f"{folder}: tensor {name} was not written as it should be")

    @property
    def ranks(self) -> dict[str, int]:
        return {layer: A.shape[0] for layer, A in self.A.items()}

    @classmethod
    def load(cls, folder: Path) -> Factors:
        alpha = files.read_json(folder / "adapter_config.json", Settings)["alpha_pattern"]
        path = folder / "adapter_model.safetensors"
        stored = files.read_tensors(path)
        A, B = (
            {layer: _tensor(path, stored, f"{PREFIX}{layer}.lora_{part}.weight") for layer in alpha} for part in "AB"
        )
        for layer in alpha:
            if A[layer].ndim != 2 or B[layer].ndim != 2 or A[layer].shape[0] != B[layer].shape[1]:
                raise UserError(f"{path} is damaged: A and B of {layer} do not go together")
        return cls(A, B, alpha)


@dataclass
class Replacement:
    """What answers in the place of the branch that a unit trained.

    Attributes:
        factors: the branch.
        instead_of: `unit`, of that unit's branch alone, or `all`, also of those of all earlier units.
        full: deltas of parameters trained in full, which stand in the place of as many; None leaves the trained ones.
    """

    factors: Factors
    instead_of: Literal["unit", "all"] = "unit"
    full: dict[str, Tensor] | None = None


def _tensor(path: Path, stored: dict[str, Tensor], name: str) -> Tensor:
    if name not in stored:
        raise UserError(f"{path} is damaged: it has no tensor {shortened(name)}")
    return stored[name]


def concatenate(history: list[Factors]) -> Factors:
    """Join all branches as one: ranks add up, every scale is folded into B, so that scaling is 1."""
    import torch

    A, B = {}, {}
    for layer in dict.fromkeys(layer for factors in history for layer in factors.A):
        having = [factors for factors in history if layer in factors.A]
        A[layer] = torch.cat([factors.A[layer] for factors in having])
        B[layer] = torch.cat([factors.scaling(layer) * factors.B[layer] for factors in having], dim=1)
    return Factors(A, B, {layer: float(each.shape[0]) for layer, each in A.items()})


def peft_settings(ranks: dict[str, int], alpha: dict[str, float], dropout: float) -> dict:
    """Give the content of adapter_config.json: every layer by its exact name, with its own rank and alpha."""
    return {
        "peft_type": "LORA",
        "r": max(ranks.values(), default=1),
        "lora_alpha": 1.0,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": dict(ranks),
        "alpha_pattern": {layer: float(alpha[layer]) for layer in ranks},
        "inference_mode": True,
    }
