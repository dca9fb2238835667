"""One unit of the sequence, stage by stage: gradient, train, consolidate. Each stage starts from files if it must.

Memory is only a cache of the run directory: whatever a stage needs and is not in memory is read back, so a run that was
killed goes on as if it had not been.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters import Adapters, Branch, Factors, adapters_for
from mllm_keeplora.adapters.mixers import load_mixer, save_mixer
from mllm_keeplora.adapters.stored import is_oracle, kept_of, parts_of, past_of, save_growth, updates_of, write_manifest
from mllm_keeplora.config import RunConfig, result_defining
from mllm_keeplora.data import Benchmark
from mllm_keeplora.data.collate import TrainCollator
from mllm_keeplora.models import Base, cache_tower, load_base
from mllm_keeplora.models.base import compute_dtype
from mllm_keeplora.runs import BASE_UNIT, DomainDir, RunDir, Unit
from mllm_keeplora.stages.effects import capacity_of, changes_of, inputs_of, sets_to_look_at, slices_of
from mllm_keeplora.stages.units import token_limit, training_records
from mllm_keeplora.strategies import DomainInfo, Strategy
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.log import log
from mllm_keeplora.training.context import RunContext
from mllm_keeplora.training.deepspeed import deepspeed_file, divided_loading
from mllm_keeplora.training.passes import Sources
from mllm_keeplora.training.seeds import seed_everything, stage_seed
from mllm_keeplora.training.state import read_training_state, write_training_state

if TYPE_CHECKING:
    from mllm_keeplora.linalg import Basis


class Learner:
    """Model, strategy and kept bases of a run, brought to wherever the next stage starts.

    Args:
        config, run, benchmark, strategy: of the run; `run.units` are the sequence.
    """

    def __init__(self, config: RunConfig, run: RunDir, benchmark: Benchmark, strategy: Strategy):
        self.config = config
        self.run = run
        self.benchmark = benchmark
        self.strategy = strategy
        self.units = run.units
        self.kept: dict[str, Basis] = {}
        self.place: tuple | None = None  # what the adapters, and all that is kept, hold now: see `bring_to`
        self.open_unit: Unit | None = None

    @cached_property
    def base(self) -> Base:
        log.info("loading base %s", self.config.base.model)
        bf16 = compute_dtype(self.config.base.dtype).itemsize == 2
        expected, parts = self.run.record["base"]["fingerprint"], self.config.adapters
        with divided_loading(self.config.deepspeed, bf16):
            base = load_base(self.config.base, parts.projector, parts.target, expected)
        if expected is None:
            self.run.record["base"]["fingerprint"] = base.fingerprint
            self.run.save()
        cache_tower(base, self.config.base.tower_cache_mb)
        return base

    @cached_property
    def adapters(self) -> Adapters:
        settings = self.config.adapters
        return adapters_for(self.base, settings.projector, settings.history, settings.dropout)

    # -- the stages ----------------------------------------------------------------------------------------------

    def prepare(self) -> dict[str, Any]:
        """Once, on the untouched base: what the strategy keeps of it (principal subspaces of the weights)."""
        self.bring_to(0)
        context = self._context(BASE_UNIT, "prepare", records=[])
        self.strategy.prepare(context)
        if distributed.is_main():
            files.write_tensors(self.run.kept_by_prepare, {name: basis.columns for name, basis in self.kept.items()})
        distributed.barrier()
        self.place = None  # the next stage reads the file, the same whether the run was interrupted or not
        logged = {"logged": context.facts} if context.facts else {}
        return {"target_layers": len(self.base.parts.target_layers), **_ranks(self.kept), **logged}

    def gradient(self, unit: Unit) -> dict[str, Any]:
        """Open the unit's branch (for KeepLoRA after a gradient pass) and keep its start on disk."""
        self._start(unit)
        context = self._context(unit, "gradient")
        self.strategy.before_domain(context)
        branch = self.adapters.branch
        assert branch is not None, f"{type(self.strategy).__name__}.before_domain opened no branch"
        folder = self.folder(unit)
        if distributed.is_main():
            branch.save(folder.init)
            files.write_json(folder.gradient, context.facts)
        self.open_unit = unit
        self._same_start_everywhere(folder)
        return {"rank_min": min(branch.ranks.values(), default=0), "rank_max": max(branch.ranks.values(), default=0)}

    def train(self, unit: Unit) -> dict[str, Any]:
        """Train the open branch; leave its factors in peft's format."""
        from mllm_keeplora.training.arguments import training_arguments
        from mllm_keeplora.training.fit import fit_domain

        folder = self.folder(unit)
        if self.open_unit != unit:
            self._start(unit)
            self._reopen(unit, trained=False)
        seed = stage_seed(self.config.seed, unit.key, "train")
        settings = self.config.train_of(unit.domains[0]) if len(unit.domains) == 1 else self.config.train
        records, epochs = training_records(unit, self.benchmark, self.config)
        bf16 = compute_dtype(self.config.base.dtype).itemsize == 2
        engine = deepspeed_file(self.config.deepspeed)
        arguments = training_arguments(settings, epochs, folder.checkpoints, seed, engine, bf16)
        seed_everything(seed)
        context = self._context(unit, "train", records)
        identity = {
            "config": self.run.record["config"],
            "unit": unit.key,
            "epochs": epochs,
            "train": result_defining(settings),
            "engine": [self.config.deepspeed, distributed.world_size()] if engine else None,  # reads no others' state
        }
        self._log_plan(unit, len(records), epochs, arguments)
        metrics = self.run.path / "metrics.jsonl"
        with watch.until_saved(), distributed.keeping_step(self.config.distributed_timeout_s):
            facts = fit_domain(self.strategy, context, settings, epochs, arguments, metrics, identity)
            factors, full = self.adapters.read(), self.adapters.read_full()
            if distributed.is_main():
                factors.save(folder.adapter, self.config.adapters.dropout)
                if full:
                    files.write_tensors(folder.projector, full)
                if self.adapters.mixer is not None:
                    save_mixer(folder.trained_mixer, self.adapters.mixer)
                write_training_state(self.strategy, folder.training_state)
                _add_facts(folder, context.facts)
        if engine and bf16:  # it rounded all parameters, those of the past too: the next stage reads the files
            distributed.barrier()
            self.open_unit, self.place = None, None
        return facts

    def consolidate(self, unit: Unit) -> dict[str, Any]:
        """Grow what is kept, with the finished branch still active; then merge from pristine base and all factors."""
        folder = self.folder(unit)
        if self.open_unit != unit:
            self._start(unit)
            self._reopen(unit, trained=True)
        context = self._context(unit, "consolidate")
        before = {layer: basis.rank for layer, basis in self.kept.items()}
        self.strategy.after_domain(context)
        if distributed.is_main():
            mixer, carried = context.answering or self.adapters.mixer, self.adapters.branch.carried
            write_manifest(folder, self.strategy.combine, self.strategy.start_from, carried, mixer)
            save_growth(folder, self.kept, before, context.forgotten)
            state = self.strategy.state_dict()
            if state:
                files.write_tensors(folder.strategy, state)
            _add_facts(folder, context.facts)
        distributed.barrier()
        self.open_unit = None
        self.place = None  # forces the merge from files, the same whether the run was interrupted or not
        self.bring_to(unit.index, asked=unit.domains[0])
        return _ranks(self.kept)

    def discard_checkpoints(self, unit: Unit) -> None:
        """Free their disk, once the ledger says that nothing needs them."""
        if distributed.is_main():
            shutil.rmtree(self.folder(unit).checkpoints, ignore_errors=True)

    def diagnose(self, unit: Unit) -> dict[str, Any]:
        """Measure what the unit did to the model, on a few records of every set; nothing is changed."""
        folder, done = self.folder(unit), self.units[: unit.index]
        self.bring_to(unit.index, asked=unit.domains[0])
        parts, before = parts_of(self.run, done), kept_of(self.run, done[:-1])
        history = updates_of(self.run, done)
        earlier = history[:-1] if self.strategy.start_from == "previous" else []
        merged = self.adapters.mode == "merged"
        dtype = next(self.base.model.parameters()).dtype if merged else None
        everything, samples = self.config.eval.domains == "all", self.config.diagnostics.samples
        facts = {
            "capacity": capacity_of(parts, self.kept),
            "changes": changes_of(history[-1], earlier, self.adapters.pristine, before, dtype),
            "inputs": {
                name: inputs_of(
                    self.adapters.model, self.base, records, history[-1], slices_of(self.kept, parts),
                    self.config.train.probe_batch_size,
                )
                for name, records in sets_to_look_at(self.benchmark, self.units, unit, everything, samples)
            },
        }  # fmt: skip
        if distributed.is_main():
            files.write_json(folder.diagnostics, facts)
        return {}

    # -- where the model is --------------------------------------------------------------------------------------

    def bring_to(self, learnt: int, known: int | None = None, asked: str | None = None) -> None:
        """Put model, kept bases and strategy to the end of a unit.

        Args:
            learnt: units that the model has learnt; 0 is the untouched base.
            known: units that kept bases and strategy know of; None for as many.
            asked: the domain or suite that is to be answered, where each domain has its own branch.
        """
        known, done = learnt if known is None else known, self.units[:learnt]
        place = (learnt, known, asked if is_oracle(self.run, done) else None)
        if self.place == place and self.open_unit is None:
            return
        past = past_of(self.run, done, asked)
        self.adapters.restore(past.factors, past.full, past.mixer)
        self.kept = kept_of(self.run, self.units[:known])
        state = self.folder(self.units[known - 1]).strategy if known else None
        self.strategy.load_state_dict(files.read_tensors(state) if state is not None and state.is_file() else {})
        self.place, self.open_unit = place, None

    def folder(self, unit: Unit) -> DomainDir:
        return self.run.folder(unit)

    def _start(self, unit: Unit) -> None:
        """Where the unit's training starts: its model may be the base, but what is known of earlier units is kept."""
        self.bring_to(0 if self.strategy.start_from == "base" else unit.index - 1, known=unit.index - 1)

    def _reopen(self, unit: Unit, trained: bool) -> None:
        folder = self.folder(unit)
        self.adapters.open(Branch.load(folder.init))
        if trained:
            full = files.read_tensors(folder.projector) if folder.projector.is_file() else {}
            self.adapters.load(Factors.load(folder.adapter), full)
            if self.adapters.mixer is not None:
                self.adapters.mixer.load_state_dict(load_mixer(folder.trained_mixer).state_dict())
            read_training_state(self.strategy, folder.training_state)
        self.open_unit = unit

    def _same_start_everywhere(self, folder: DomainDir) -> None:
        """Singular vectors may differ in sign or order between processes: all start from the main one's file."""
        if distributed.world_size() > 1:
            distributed.barrier()
            unit, self.open_unit = self.open_unit, None
            self.adapters.restore(self.adapters.past, self.adapters.past_full, self.adapters.past_mixer)
            self.adapters.open(Branch.load(folder.init))
            self.open_unit = unit

    def _context(self, unit: Unit, stage: str, records: list | None = None) -> RunContext:
        import torch

        seed = stage_seed(self.config.seed, unit.key, stage)
        seed_everything(seed)
        if records is None:
            records, _ = training_records(unit, self.benchmark, self.config)
        limit = token_limit([name for each in self.units for name in each.domains], self.config)
        collator = TrainCollator(self.base.prompt, limit)
        rng = torch.Generator().manual_seed(seed)
        info = DomainInfo(unit.index - 1, unit.name, len(self.units))
        size = self.config.train.probe_batch_size
        sources = Sources(
            self.benchmark.anchor_records, self.benchmark.train_records, [each.name for each in self.units]
        )
        return RunContext(self.base, self.adapters, self.kept, info, records, collator, rng, size, sources, seed)

    def _log_plan(self, unit: Unit, num_records: int, epochs: float, arguments: Any) -> None:
        trained = self.adapters.trainable()
        world, micro, steps = (
            distributed.world_size(),
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
        )
        log.info(
            "%s: %d records x %g epochs, batch %d = %d processes x %d x %d accumulated, %s trained parameters",
            unit.name, num_records, epochs, world * micro * steps, world, micro, steps,
            f"{sum(parameter.numel() for parameter in trained.values()):,}",
        )  # fmt: skip


def _add_facts(folder: DomainDir, facts: dict[str, Any]) -> None:
    if facts:
        files.write_json(folder.gradient, {**files.read_json(folder.gradient), **facts})


def _ranks(kept: dict[str, Basis]) -> dict[str, int]:
    ranks = sorted(basis.rank for basis in kept.values())
    if not ranks:
        return {}
    return {"kept_min": ranks[0], "kept_median": ranks[len(ranks) // 2], "kept_max": ranks[-1]}
