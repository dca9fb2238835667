"""What to learn and what to keep: one file per method and this literal registry.

A strategy is a class with options (a pydantic model), declarations and hooks; see `base.Strategy`.
"""

from __future__ import annotations

import sys

from pydantic import ValidationError

from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError, known, several, validation_faults
from mllm_keeplora.strategies.base import Context, DomainInfo, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.agem import AGEM
from mllm_keeplora.strategies.baselines.ewc import EWC
from mllm_keeplora.strategies.baselines.finetune import Finetune
from mllm_keeplora.strategies.baselines.independent import Independent
from mllm_keeplora.strategies.baselines.joint import Joint
from mllm_keeplora.strategies.baselines.lwf import LwF
from mllm_keeplora.strategies.baselines.merged import Merged
from mllm_keeplora.strategies.baselines.ortho_lora import OrthoLoRA
from mllm_keeplora.strategies.baselines.replay import Replay
from mllm_keeplora.strategies.baselines.slao import SLAO
from mllm_keeplora.strategies.mixture.dac import DAC
from mllm_keeplora.strategies.mixture.disco import DISCO
from mllm_keeplora.strategies.mixture.gainlora import GainLoRA
from mllm_keeplora.strategies.mixture.hide import HiDe
from mllm_keeplora.strategies.mixture.moelora import MoELoRA
from mllm_keeplora.strategies.mixture.mtl_lora import MTLLoRA
from mllm_keeplora.strategies.mixture.routed import Routed
from mllm_keeplora.strategies.mixture.sdlora import SDLoRA
from mllm_keeplora.strategies.subspace.gpm import GPM
from mllm_keeplora.strategies.subspace.inflora import InfLoRA
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA
from mllm_keeplora.strategies.subspace.loda import LoDA
from mllm_keeplora.strategies.subspace.olora import OLoRA
from mllm_keeplora.strategies.subspace.owm import OWM
from mllm_keeplora.strategies.subspace.reglora import RegLoRA
from mllm_keeplora.system.plugins import ENTERED

STRATEGIES: dict[str, type[Strategy]] = {
    "agem": AGEM,
    "dac": DAC,
    "disco": DISCO,
    "ewc": EWC,
    "finetune": Finetune,
    "gainlora": GainLoRA,
    "gpm": GPM,
    "hide": HiDe,
    "independent": Independent,
    "inflora": InfLoRA,
    "joint": Joint,
    "keeplora": KeepLoRA,
    "loda": LoDA,
    "lwf": LwF,
    "merged": Merged,
    "moelora": MoELoRA,
    "mtl_lora": MTLLoRA,
    "olora": OLoRA,
    "ortho_lora": OrthoLoRA,
    "owm": OWM,
    "reglora": RegLoRA,
    "replay": Replay,
    "routed": Routed,
    "sdlora": SDLoRA,
    "slao": SLAO,
}


def build_strategy(config: StrategyConfig, origin: str = "config") -> Strategy:
    """Build the strategy of a run, its options checked: defaults, then the preset's, then those given.

    Raises:
        UserError: unknown strategy, preset or option; an option out of range; a strategy that begins no branch.
    """
    if config.name not in STRATEGIES:
        raise UserError(f"strategy.name {config.name!r} is unknown; known: {known(STRATEGIES)} ({origin})")
    strategy = STRATEGIES[config.name]
    if strategy.before_domain is Strategy.before_domain and strategy.stream != "none":
        raise UserError(f"strategy.name {config.name!r}: {strategy.__name__} defines no before_domain ({origin})")
    presets: dict[str | None, dict] = {None: {}, **strategy.presets}
    if config.preset not in presets:
        raise UserError(
            f"strategy.preset {config.preset!r} is unknown; {config.name} has {known(strategy.presets)} ({origin})"
        )
    try:
        options = strategy.Options.model_validate({**presets[config.preset], **config.options})
    except ValidationError as error:
        of = f" of strategy {config.name}"
        raise several(validation_faults(error, origin, strategy.Options, prefix="strategy.", of=of)) from None
    return strategy(options)


def summary_of(name: str) -> str:
    """Give the idea of a strategy in one sentence: the first line of its file, or of a plugin's class."""
    strategy = STRATEGIES[name]
    told = strategy if ("STRATEGIES", name) in ENTERED else sys.modules[strategy.__module__]
    return (told.__doc__ or "").strip().partition("\n")[0]


__all__ = ["STRATEGIES", "Context", "DomainInfo", "Strategy", "StrategyOptions", "build_strategy", "summary_of"]
