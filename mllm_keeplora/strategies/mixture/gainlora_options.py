"""Options of GainLoRA: those of its gates, and those of the method whose branches they gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from mllm_keeplora.errors import known, validation_faults
from mllm_keeplora.strategies.base import Samples, Strategy, StrategyOptions
from mllm_keeplora.strategies.subspace.gpm import GPM
from mllm_keeplora.strategies.subspace.inflora import InfLoRA
from mllm_keeplora.strategies.subspace.olora import OLoRA

BASES: dict[str, type[Strategy]] = {"gpm": GPM, "inflora": InfLoRA, "olora": OLoRA}
DEFAULTS = {"inflora": {"energy": 0.995}}  # that of gated runs on T5, as the energy of gates is


class GainLoRAOptions(StrategyOptions):
    """Options of gates are published for T5; nothing is for LLaVA.

    `base_options` are the base method's own; it shares rank and alpha. `gate_samples` is a count of records, or a share
    of them (published: about 1000 batches of 32; the questions alone are read).
    """

    base: str = "inflora"  # that of the published code
    base_options: dict[str, Any] = Field(default_factory=dict)
    gate_width: int = Field(100, ge=1)
    gate_rate: float = Field(1.0, gt=0.0, lt=float("inf"), description="times train.lr; one rate, 3e-4, is published")
    gate_head: Literal["cosine", "dot"] = "cosine"  # the published numbers come from the cosine; dot is the paper's
    key_length: Literal["row", "uniform"] = Field(
        "row", description="of a new gate: as a row of a linear layer, then that of the domain before; uniform: as "
        "uniform numbers in (-1, 1) at every domain, as published"
    )  # fmt: skip
    gate_samples: Samples = 1024
    gate_energy: float = Field(0.995, ge=0.0, le=1.0)
    gate_energy_end: float = Field(1.0, ge=0.0, le=1.0)
    gate_energy_measure: Literal["sigma2", "sigma4"] = "sigma4"  # the published energies belong to it
    pictures: bool = False  # text alone is published
    row_renorm: bool = False  # true is published, and lets p_1 and p_2 of past questions move

    @field_validator("base")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in BASES:
            raise ValueError(f"must be one of {known(BASES)}")
        return value

    @field_validator("base_options")
    @classmethod
    def _accepted_by_base(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        shared = {"rank", "alpha"} & value.keys()
        if shared:
            raise ValueError(f"{min(shared)} is shared with the gated method: set strategy.{min(shared)}")
        if {"base", "rank", "alpha"} <= info.data.keys():  # else they are at fault themselves
            try:
                options_of_base(info.data, value)
            except ValidationError as error:
                base = info.data["base"]
                faults = validation_faults(error, f"options of {base}", BASES[base].Options, of=f" of {base}")
                raise ValueError(f"{base} refuses them: {'; '.join(faults)}") from None
        return value

    def gate_energy_at(self, index: int, total: int) -> float:
        """Give the share of energy that a memory is to hold at a domain, from `gate_energy` towards the end's."""
        return self.gate_energy + (self.gate_energy_end - self.gate_energy) * index / total


def options_of_base(own: Mapping[str, Any], base_options: Mapping[str, Any]) -> StrategyOptions:
    """Build the options of the method that is gated: its own, beside the rank and alpha of GainLoRA's (`own`).

    Raises:
        ValidationError: it does not take them.
    """
    given = {"rank": own["rank"], "alpha": own["alpha"], **DEFAULTS.get(own["base"], {}), **base_options}
    return BASES[own["base"]].Options.model_validate(given)
