"""Every fault of a run's config, strategy options, data and base, found before anything runs and told at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from mllm_keeplora.checks.engine import settings_faults, unfit_for
from mllm_keeplora.checks.memory import Estimate, estimate
from mllm_keeplora.checks.records import ProcessorTrial, gold_faults, load_prompt, mixed_faults
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record, load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.data.media.images import Looks, image_size
from mllm_keeplora.errors import UserError, first_line, several, shortened
from mllm_keeplora.models import ChatPrompt
from mllm_keeplora.models.base import compute_dtype, refuse_original_llava, skeleton
from mllm_keeplora.models.causal import CausalFamily
from mllm_keeplora.models.causal.parts import name_parts, summary_of
from mllm_keeplora.models.fingerprint import fingerprint
from mllm_keeplora.models.shipped import prompt_style, resolve
from mllm_keeplora.strategies import Strategy, build_strategy
from mllm_keeplora.system import distributed
from mllm_keeplora.system.log import log
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.training.deepspeed import zero_stage

T = TypeVar("T")
LOOKED_AT = 50  # records of a domain, for the estimate of memory


@dataclass
class Checked:
    """Holds what a faultless config resolves to."""

    strategy: Strategy
    benchmark: Benchmark
    base_location: str
    base_fingerprint: str | None  # None for a hub id, known once it is loaded
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)  # one line for each part of the base
    pictures: dict[str, dict[str, int]] = field(default_factory=dict)  # records that have any, as `counts`
    notes: list[str] = field(default_factory=list)  # what is no fault, but may not be what was meant
    unseen: list[str] = field(default_factory=list)  # what could not be looked at


def check_everywhere(config: RunConfig, seen: Collection[str] = ()) -> Checked:
    """Check a run by all its processes: the main one reads the data first, then each looks into its share.

    Raises:
        UserError: on every process, with the faults that all of them found.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if world == 1:
        return check_run(config, seen=seen)
    checked = distributed.main_first(lambda: check_run(config, look_inside=False))
    own: tuple[list[str], int] = [], 0
    try:
        checked.notes += check_run(config, seen=seen, share=(rank, world)).notes
    except UserError as error:
        own = list(error.sentences), error.more
    found = distributed.gather(own)
    faults = [fault for share, _ in found for fault in share]
    if faults:
        raise several(faults, more=sum(more for _, more in found))
    return checked


def check_run(
    config: RunConfig, look_inside: bool = True, seen: Collection[str] = (), share: tuple[int, int] = (0, 1)
) -> Checked:
    """Resolve a run and look for every fault it could fail of later.

    Args:
        config: a loaded config.
        look_inside: decode every image and tokenise every training record once, not only read the data files.
        seen: domains, suites and anchor sets that a started run has looked into already.
        share: (rank, number of processes): look into this process's share of the records only.

    Raises:
        UserError: one sentence a fault, all of them in one error.
    """
    faults = _Faults()
    strategy = faults.of(build_strategy, config.strategy, f"run {config.name}")
    location = faults.of(resolve, config.base)
    base_fingerprint, anatomy, unseen = None, Anatomy(), []
    if location is not None:
        if Path(location).is_dir():
            base_fingerprint = faults.of(fingerprint, Path(location))
            faults.of(refuse_original_llava, config.base.model, location)
        anatomy = faults.of(_anatomy, config, location, unseen) or anatomy
    stage = faults.of(zero_stage, config.deepspeed)
    faults += settings_faults(config, stage)
    benchmark = faults.of(load_benchmark, config, _drawing())
    counts: dict[str, dict[str, int]] = {}
    pictures: dict[str, dict[str, int]] = {}
    notes: list[str] = []
    if benchmark is not None:
        # Every set is read; one that cannot be read is a fault and goes on as empty.
        trained = {name: faults.of(benchmark.train_records, name) or () for name in benchmark.domains}
        asked = [*benchmark.domains, *benchmark.suites]
        graded = {name: faults.of(benchmark.test_records, name) or () for name in asked}
        counts = {name: {"train": len(records)} for name, records in trained.items()}
        for name, records in graded.items():
            counts.setdefault(name, {})["test"] = len(records)
        for name in strategy.options.record_sets if strategy is not None else ():
            records = faults.of(benchmark.anchor_records, name) or ()
            trained[f"anchors of {name}"] = [record.first_exchange() for record in records]
        if look_inside:
            prompt = faults.of(_prompt, config, location, unseen) if location is not None else None
            rank, world = share
            if rank == 0:  # over all sets, whole: engines change, domains are appended, a share may be of one kind
                faults += mixed_faults(trained, graded, prompt, stage, strategy is not None and strategy.joins_domains)
            own = [
                {name: records[rank::world] for name, records in sets.items() if name not in seen}
                for sets in (trained, graded)
            ]
            looks = Looks()
            _look_inside(
                config, benchmark, prompt and ProcessorTrial(prompt, looks, anatomy.positions), looks, *own, faults
            )
            # Of a share of the records counts would mislead.
            treated = sorted(looks.treated.items()) if world == 1 else ()
            notes += [f"{count} pictures are {done}" for done, count in treated]
            for kind, sets in zip(("train", "test"), own, strict=True):
                for name, records in sets.items():
                    pictures.setdefault(name, {})[kind] = with_any = sum(bool(record.media) for record in records)
                    if records and not with_any and name in benchmark.domains and world == 1:
                        notes.append(f"no {kind} record of {name} has a picture")
    if strategy is not None:
        faults += unfit_for(config, strategy, stage)
    if faults:
        raise several(faults, more=faults.more)
    return Checked(strategy, benchmark, location, base_fingerprint, counts, anatomy.parts, pictures, notes, unseen)


class _Faults(list[str]):
    """Faults that were found, and how many there are beyond those that are spelled out."""

    more = 0

    def of(self, work: Callable[..., T], *given: Any) -> T | None:
        """Give what some work gives; None where it finds faults, which are added."""
        try:
            return work(*given)
        except UserError as error:
            self.extend(error.sentences)
            self.more += error.more
            return None


@dataclass(frozen=True)
class Anatomy:
    """What a base's config tells of it: a line for each part, and how many tokens it has places for."""

    parts: list[str] = field(default_factory=list)
    positions: int | None = None


def _anatomy(config: RunConfig, location: str, unseen: list[str]) -> Anatomy:
    """Look at a base by its config alone; `unseen` is told if it is not on this machine."""
    try:
        model = skeleton(location)
    except ImportError as error:
        raise UserError(f"base {location}: {first_line(error)}") from None
    except (OSError, ValueError) as error:
        unseen.append(f"the base's layers ({first_line(error)})")
        return Anatomy()
    except MemoryError:
        raise
    except Exception as error:  # of whatever kind the checks of a model's config raise
        raise UserError(f"base {location}: its config.json cannot be used: {shortened(first_line(error))}") from None
    parts = summary_of(model, name_parts(model, config.adapters.projector, config.adapters.target))
    return Anatomy(parts, getattr(model.config.get_text_config(), "max_position_embeddings", None))


def memory_of(config: RunConfig, checked: Checked) -> Estimate | None:
    """Estimate a faultless run's memory on this machine; None where the base cannot be looked at beforehand."""
    import torch

    prompt = load_prompt(checked.base_location, prompt_style(config.base))
    dtype = compute_dtype(config.base.dtype)
    if prompt is None:
        log.info("memory is not estimated: the processor of %s is not on this machine", checked.base_location)
        return None
    try:
        model = skeleton(checked.base_location, dtype)
        parts = name_parts(model, config.adapters.projector, config.adapters.target)
        # The longest of some records of every domain, and the one with the most tokens that carry loss.
        sets = map(checked.benchmark.train_records, checked.benchmark.domains)
        some = [record for records in sets for record in evenly_spaced(records, LOOKED_AT)]
        return estimate(
            config,
            checked.strategy,
            CausalFamily(prompt),
            model,
            parts,
            tokens=max(prompt.total_tokens(record, list(map(image_size, record.media))) for record in some),
            answer_tokens=max(map(prompt.trained_tokens, some)),
            domains=len(checked.benchmark.domains),
            dtype=dtype,
            on_gpu=torch.cuda.is_available(),
            world=distributed.world_size(),
        )
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        log.info("memory is not estimated: %s", first_line(error))
        return None


def _prompt(config: RunConfig, location: str, unseen: list[str]) -> ChatPrompt | None:
    prompt = load_prompt(location, prompt_style(config.base))
    if prompt is None:
        unseen.append(f"records as its processor sees them (that of {location} is not on this machine)")
    return prompt


def _look_inside(
    config: RunConfig,
    benchmark: Benchmark,
    trial: ProcessorTrial | None,
    looks: Looks,
    trained: dict[str, Sequence[Record]],
    graded: dict[str, Sequence[Record]],
    faults: _Faults,
) -> None:
    """Decode every image, try every gold answer, show every record to the processor; add the faults."""
    parts = [*trained.values(), *graded.values()]
    with progress_bar("check images", sum(map(len, parts))) as advance:
        faults += looks.faults(chain.from_iterable(parts), advance)
    for name, records in graded.items():
        faults.of(faults.extend, gold_faults(benchmark.graded(name), records))
    for name, records in trained.items() if trial is not None else ():
        with progress_bar(f"check tokens: {name}", len(records)) as advance:
            faults.of(faults.extend, trial.training_faults(records, config.train_of(name).max_length, advance))
    for name, records in graded.items() if trial is not None else ():
        with progress_bar(f"check questions: {name}", len(records)) as advance:
            faults.of(faults.extend, trial.question_faults(records, benchmark.graded(name), advance))


def _drawing() -> Callable[[int, int], None]:
    """Tell the progress of data that is drawn at first use, in the log at every fifth of the way."""
    told: set[int] = set()

    def progress(done: int, total: int) -> None:
        fifth = 5 * done // max(total, 1)
        if fifth not in told:
            told.add(fifth)
            log.info("drawing the benchmark's pictures: %d %%", 20 * fifth)

    return progress
