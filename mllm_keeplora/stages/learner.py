"""Where the model of a run is: brought to wherever the next stage starts, from files if it must.

Memory is only a cache of the run directory: whatever a stage needs and is not in memory is read back, so a run that was
killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters import Adapters, Branch, Factors, adapters_for
from mllm_keeplora.adapters.mixers import load_mixer
from mllm_keeplora.adapters.placed import PlacedModel
from mllm_keeplora.adapters.stored import kept_of, trained_of
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.models import Base, cache_tower, load_base
from mllm_keeplora.models.base import compute_dtype
from mllm_keeplora.runs import DomainDir, RunDir, Unit
from mllm_keeplora.stages.units import token_limit, training_records
from mllm_keeplora.strategies import DomainInfo, Strategy
from mllm_keeplora.strategies.context import Context
from mllm_keeplora.strategies.passes import Sources
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log
from mllm_keeplora.training.deepspeed import divided_loading
from mllm_keeplora.training.order import Collator
from mllm_keeplora.training.seeds import stage_seed
from mllm_keeplora.training.state import read_training_state

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.prototypes import Prototypes
    from mllm_keeplora.linalg import Basis


@dataclass(eq=False)
class Learner:
    """Brings model, strategy and kept bases of a run to wherever the next stage starts."""

    config: RunConfig
    run: RunDir
    benchmark: Benchmark
    strategy: Strategy
    kept: dict[str, Basis] = field(default_factory=dict)
    state_after: int | None = None  # units behind the kept bases and strategy in memory; None: stale, read the files
    open_unit: Unit | None = None

    @property
    def units(self) -> list[Unit]:
        """The units of the sequence."""
        return self.run.units

    @cached_property
    def base(self) -> Base:
        """The base, loaded at first use; of a hub's base the fingerprint is recorded then."""
        log.info("loading base %s", self.config.base.model)
        bf16 = compute_dtype(self.config.base.dtype).itemsize == 2
        expected, settings = self.run.ledger.base["fingerprint"], self.config.adapters
        with divided_loading(self.config.deepspeed, bf16):
            base = load_base(self.config.base, settings.projector, settings.target, expected)
        if expected is None:
            self.run.ledger.base["fingerprint"] = base.fingerprint
            self.run.save()
        cache_tower(base, self.config.base.tower_cache_mb)
        return base

    @cached_property
    def placed(self) -> PlacedModel:
        """The model as it is after any unit."""
        settings = self.config.adapters
        return PlacedModel(adapters_for(self.base, settings.projector, settings.history, settings.dropout), self.run)

    @property
    def adapters(self) -> Adapters:
        return self.placed.adapters

    def bring_to(self, learnt: int, state_after: int | None = None, asked: str | None = None) -> None:
        """Put model, kept bases and strategy to the end of a unit.

        Args:
            learnt: units that the model has learnt; 0 is the untouched base.
            state_after: units behind the kept bases and the strategy's state; None for as many.
            asked: the domain or suite to be answered; it matters only where each domain has its own branch (oracle).
        """
        state_after = learnt if state_after is None else state_after
        if self.open_unit is not None:
            self.invalidate()
        self.placed.at(self.units[:learnt], asked)
        if self.state_after != state_after:
            self.kept = kept_of(self.run, self.units[:state_after])
            state = self.run.folder(self.units[state_after - 1]).strategy if state_after else None
            self.strategy.load_state_dict(
                files.read_tensors(state) if state is not None and files.is_there(state) else {}
            )
            self.state_after = state_after

    def invalidate(self) -> None:
        """Let the next stage read the files, so that it does the same whether or not the run was interrupted."""
        self.placed.invalidate()
        self.state_after, self.open_unit = None, None

    def start(self, unit: Unit) -> None:
        """Bring the model to where a unit starts, and what is kept to the end of the one before.

        That start is the model after the unit before, or the untouched base if the strategy starts from it.
        """
        self.bring_to(0 if self.strategy.start_from == "base" else unit.index - 1, state_after=unit.index - 1)

    def reopen(self, unit: Unit, trained: bool) -> None:
        """Open a unit's branch from its files, as it was at its start or as it was `trained`."""
        folder = self.run.folder(unit)
        self.adapters.open(Branch.load(folder.init))
        if trained:
            self.adapters.load(*trained_of(self.run, unit), self._prototypes_of(folder))
            if self.adapters.mixer is not None:
                self.adapters.mixer.load_state_dict(load_mixer(folder.trained_mixer).state_dict())
            read_training_state(self.strategy, folder.training_state)
        self.open_unit = unit

    @staticmethod
    def _prototypes_of(folder: DomainDir) -> Prototypes | None:
        """Read the prototypes that trained beside a unit's branch, if any did."""
        if not files.is_there(folder.prototypes):
            return None
        from mllm_keeplora.adapters.prototypes import Prototypes

        return Prototypes.load(folder.prototypes)

    def context(self, unit: Unit, stage: str, records: Sequence[Record] | None = None) -> Context:
        """Seed a stage and describe the unit to the strategy; with its training records, if no others are given."""
        import torch
        from transformers import set_seed

        seed = stage_seed(self.config.seed, unit.key, stage)
        set_seed(seed)
        if records is None:
            records, _ = training_records(unit, self.benchmark, self.config)
        limit = token_limit([name for each in self.units for name in each.domains], self.config)
        collate, rng = Collator(self.base.family, limit), torch.Generator().manual_seed(seed)
        names, size = [each.name for each in self.units], self.config.train.probe_batch_size
        info = DomainInfo(unit.index - 1, unit.name, len(names))
        sources = Sources(self.benchmark.anchor_records, self.benchmark.train_records, names)
        return Context(
            self.base, self.adapters, self.kept, info, records, collate, rng, size, sources, seed, self._recalling(unit)
        )

    def _recalling(self, unit: Unit) -> Callable[[int], tuple[Factors, dict[str, Tensor]]]:
        """Read what domains trained, by their place: those that a strategy says it recalls, and the unit's own."""

        def trained(index: int) -> tuple[Factors, dict[str, Tensor]]:
            recalls, own = self.strategy.recalls, unit.index - 1
            if not {"none": own, "last": own - 1, "all": 0}[recalls] <= index <= own:
                raise RuntimeError(
                    f"{type(self.strategy).__name__} asks in domain {own} for what domain {index} trained; its "
                    f"`recalls` is {recalls!r}"
                )
            return trained_of(self.run, self.units[index])

        return trained


def add_facts(folder: DomainDir, facts: dict[str, Any]) -> None:
    """Enter facts in a unit's gradient.json, beside those that are there."""
    if facts:
        files.write_json(folder.gradient, {**files.read_json(folder.gradient, files.OBJECT), **facts})


def ranks_of(kept: dict[str, Basis]) -> dict[str, int]:
    """Give the smallest, median and largest rank of kept bases; nothing where nothing is kept."""
    ranks = sorted(basis.rank for basis in kept.values())
    if not ranks:
        return {}
    return {"kept_min": ranks[0], "kept_median": ranks[len(ranks) // 2], "kept_max": ranks[-1]}
