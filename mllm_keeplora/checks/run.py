"""Every fault of a run's config, strategy options, data and base, found before anything runs and told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mllm_keeplora.checks.classes import class_faults, padding_faults, text_faults
from mllm_keeplora.checks.engine import settings_faults, unfit_for, unfit_for_towers
from mllm_keeplora.checks.memory import Estimate, estimate
from mllm_keeplora.checks.records import ProcessorTrial, gold_faults, load_family, mixed_faults
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record, load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.data.media.images import OF_CLIPS, Looks
from mllm_keeplora.errors import REFUSED, UserError, first_line, several
from mllm_keeplora.metrics import UNGRADED
from mllm_keeplora.models.base import compute_dtype, family_of, refuse_original_llava
from mllm_keeplora.models.causal import CausalFamily
from mllm_keeplora.models.dual import DualFamily
from mllm_keeplora.models.family import Family
from mllm_keeplora.models.fingerprint import fingerprint
from mllm_keeplora.models.reading import skeleton
from mllm_keeplora.models.shipped import resolve
from mllm_keeplora.models.weights import refuse_small_vocabulary, refuse_unfit
from mllm_keeplora.strategies import Strategy, build_strategy
from mllm_keeplora.system import distributed
from mllm_keeplora.system.known import Known
from mllm_keeplora.system.log import log
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.system.versions import untried
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
    # Of a domain or suite the digests of its pictures by file (train, test, validation), a text for each record.
    shown: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def base_like(self, recorded: str | None) -> str | None:
        """Give the base's fingerprint in the form of a recorded one, for older runs knew less of a base."""
        if self.base_fingerprint is None:
            return None
        return fingerprint(Path(self.base_location), like=recorded)


def check_everywhere(config: RunConfig) -> Checked:
    """Check a run by all its processes: the main one reads the data first, then each looks into its share.

    Raises:
        UserError: on every process, with the faults that all of them found.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if world == 1:
        return check_run(config)
    checked = distributed.main_first(lambda: check_run(config, look_inside=False))
    own: tuple[list[str], int, dict[str, dict[str, list[str]]]] = [], 0, {}
    try:
        of_share = check_run(config, share=(rank, world))
        checked.notes += of_share.notes
        own = [], 0, of_share.shown
    except UserError as error:
        own = list(error.sentences), error.more, {}
    found = distributed.gather(own)
    faults = [fault for share, _, _ in found for fault in share]
    if faults:
        raise several(faults, more=sum(more for _, more, _ in found))
    for name, files in own[2].items():
        shares = {file: [shown[name][file] for _, _, shown in found] for file in files}
        checked.shown[name] = {file: distributed.dealt_back(each) for file, each in shares.items()}
    return checked


def check_run(config: RunConfig, look_inside: bool = True, share: tuple[int, int] = (0, 1)) -> Checked:
    """Resolve a run and look for every fault it could fail of later.

    Args:
        config: a loaded config.
        look_inside: decode every image and tokenise every record, but for those that had no fault before, not only read
            the data files.
        share: (rank, number of processes): look into this process's share of the records only.

    Raises:
        UserError: one sentence a fault, all of them in one error.
    """
    faults = _Faults()
    strategy = faults.of(build_strategy, config.strategy, f"run {config.name}")
    location = faults.of(resolve, config.base)
    base_fingerprint, anatomy, unseen = None, Anatomy(), []
    if location is not None:
        if is_folder := Path(location).is_dir():
            base_fingerprint = faults.of(fingerprint, Path(location))
        if base_fingerprint is not None or not is_folder:
            anatomy = faults.of(_anatomy, config, location, base_fingerprint, strategy, unseen) or anatomy
    stage = faults.of(zero_stage, config.deepspeed)
    faults += settings_faults(config, stage)
    benchmark = faults.of(load_benchmark, config, _drawing())
    counts: dict[str, dict[str, int]] = {}
    pictures: dict[str, dict[str, int]] = {}
    shown: dict[str, dict[str, list[str]]] = {}
    notes = untried() if look_inside and share[0] == 0 else []
    if benchmark is not None:
        # Every set is read; one that cannot be read is a fault and goes on as empty.
        trained = {name: faults.of(benchmark.train_records, name) or () for name in benchmark.domains}
        asked = [*benchmark.domains, *benchmark.suites]
        graded = {name: faults.of(benchmark.test_records, name) or () for name in asked}
        for name in asked if share[0] == 0 else ():
            faults.of(
                faults.extend, class_faults(benchmark, name, strategy is not None and strategy.options.every_class)
            )
        for scorer in dict.fromkeys(benchmark.graded(name).scorer for name in asked):
            if scorer in UNGRADED:
                names = [name for name in asked if benchmark.graded(name).scorer == scorer]
                notes.append(f"{', '.join(names)}: {UNGRADED[scorer]}")
        counts = {name: {"train": len(records)} for name, records in trained.items()}
        for name, records in graded.items():
            counts.setdefault(name, {})["test"] = len(records)
        for name in strategy.options.record_sets if strategy is not None else ():
            records = faults.of(benchmark.anchor_records, name) or ()
            trained[f"anchors of {name}"] = [record.first_exchange() for record in records]
        if look_inside:
            family = faults.of(_family, config, location, unseen, anatomy) if location is not None else None
            prompt = family.prompt if isinstance(family, CausalFamily) else None
            if isinstance(family, DualFamily):
                for name in asked:
                    faults.of(faults.extend, text_faults(benchmark, name, family.texts))
                faults.extend(padding_faults(strategy and strategy.options, family.texts))
            rank, world = share
            if rank == 0:  # over all sets, whole: engines change, domains are appended, a share may be of one kind
                faults += mixed_faults(trained, graded, prompt, stage, strategy is not None and strategy.joins_domains)
            own = [{name: records[rank::world] for name, records in sets.items()} for sets in (trained, graded)]
            with Known.of_user() as known:
                looks = Looks(known)
                trial = prompt and ProcessorTrial(prompt, looks, anatomy.positions, known)
                shown = _look_inside(config, benchmark, trial, looks, *own, faults)
            # Of a share of the records counts would mislead.
            treated = sorted(looks.treated.items()) if world == 1 else ()
            notes += [f"{count} {'clips' if done in OF_CLIPS else 'pictures'} are {done}" for done, count in treated]
            for kind, sets in zip(("train", "test"), own, strict=True):
                for name, records in sets.items():
                    pictures.setdefault(name, {})[kind] = with_any = sum(bool(record.media) for record in records)
                    if records and not with_any and name in benchmark.domains and world == 1:
                        notes.append(f"no {kind} record of {name} has a picture")
    if strategy is not None:
        faults += unfit_for(config, strategy, stage)
    if strategy is not None and anatomy.kind is DualFamily:
        faults += unfit_for_towers(config, strategy, stage)
    if faults:
        raise several(list(dict.fromkeys(faults)), more=faults.more)  # what two readers met is told once
    return Checked(
        strategy, benchmark, location, base_fingerprint, counts, anatomy.parts, pictures, notes, unseen, shown
    )


class _Faults(list[str]):
    """Faults that were found, and how many there are beyond those that are spelled out."""

    more = 0

    def of(self, work: Callable[..., T], *given: Any) -> T | None:
        """Give what some work gives; None where it finds faults, which are added."""
        try:
            return work(*given)
        except UserError as error:
            if error.code != REFUSED:  # no fault of what was asked for: it ends the check
                raise
            self.extend(error.sentences)
            self.more += error.more
            return None


@dataclass(frozen=True)
class Anatomy:
    """What a base's config tells: a line a part, how many tokens it has places for and knows, and its family."""

    parts: list[str] = field(default_factory=list)
    positions: int | None = None
    vocabulary: int | None = None
    kind: type[Family] | None = None


def _anatomy(
    config: RunConfig, location: str, known_as: str | None, strategy: Strategy | None, unseen: list[str]
) -> Anatomy:
    """Look at a base by its config and the names of its weights; `unseen` is told if it is not on this machine."""
    trusted, is_folder = config.base.trust_remote_code, Path(location).is_dir()
    if is_folder:
        refuse_original_llava(config.base.model, location)
    try:
        kind = family_of(config.base, location, local_files_only=not is_folder)
        if is_folder:
            refuse_unfit(Path(location), trusted, known_as, kind.auto)
        model = skeleton(location, trusted=trusted, auto=kind.auto)
    except UserError as error:
        if is_folder or not isinstance(error.__cause__, (OSError, ValueError)):
            raise
        unseen.append(f"the base's layers ({error})")
        return Anatomy()
    parts = kind.name_parts(model, config.adapters.projector, config.adapters.target)
    if strategy is not None:
        layers = {name: model.get_submodule(name) for name in parts.target_layers}
        sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        strategy.options.refuse_unfit(sizes, {name: parts.tower(name) for name in layers})
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Anatomy(kind.summary(model, parts), positions, kind.vocabulary(model), kind)


def memory_of(config: RunConfig, checked: Checked) -> Estimate | None:
    """Estimate a faultless run's memory on this machine; None where the base cannot be looked at beforehand."""
    import torch

    family, dtype = load_family(config.base, checked.base_location), compute_dtype(config.base.dtype)
    if family is None:
        log.info("memory is not estimated: the processor of %s is not on this machine", checked.base_location)
        return None
    try:
        model = skeleton(checked.base_location, dtype, config.base.trust_remote_code, family.auto)
        parts = family.name_parts(model, config.adapters.projector, config.adapters.target)
        # The longest of some records of every domain, and the one with the most tokens that carry loss.
        sets = map(checked.benchmark.train_records, checked.benchmark.domains)
        some = [record for records in sets for record in evenly_spaced(records, LOOKED_AT)]
        tokens, answer_tokens = map(max, zip(*map(family.extent, some), strict=True))
        return estimate(
            config,
            checked.strategy,
            family,
            model,
            parts,
            tokens=tokens,
            answer_tokens=answer_tokens,
            classes=max(len(record.classes.names) if record.classes else 0 for record in some),
            domains=len(checked.benchmark.domains),
            dtype=dtype,
            on_gpu=torch.cuda.is_available(),
            world=distributed.world_size(),
        )
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        log.info("memory is not estimated: %s", first_line(error))
        return None


def _family(config: RunConfig, location: str, unseen: list[str], anatomy: Anatomy) -> Family | None:
    family = load_family(config.base, location)
    if family is not None:
        refuse_small_vocabulary(location, family.processor, anatomy.vocabulary)
        if isinstance(family, DualFamily):
            family.example()  # a processor that prepares no picture is told before any is shown to it
    else:
        unseen.append(f"records as its processor sees them (that of {location} is not on this machine)")
    return family


def _look_inside(
    config: RunConfig,
    benchmark: Benchmark,
    trial: ProcessorTrial | None,
    looks: Looks,
    trained: dict[str, Sequence[Record]],
    graded: dict[str, Sequence[Record]],
    faults: _Faults,
) -> dict[str, dict[str, list[str]]]:
    """Decode every image, try every gold answer, show every record to the processor; add the faults.

    Returns:
        `Checked.shown`.
    """
    shown: dict[str, dict[str, list[str]]] = {}
    with progress_bar("check images", sum(map(len, [*trained.values(), *graded.values()]))) as advance:
        for kind, sets in (("train", trained), ("graded", graded)):
            for name, records in sets.items():
                digests: list[str] = []
                faults += looks.faults(records, advance, digests)
                file = benchmark.file_of(name) if kind == "graded" else kind
                shown.setdefault(name, {})[file] = digests
    for name, records in graded.items():
        faults.of(faults.extend, gold_faults(benchmark.graded(name), records))
    for name, records in trained.items() if trial is not None else ():
        with progress_bar(f"check tokens: {name}", len(records)) as advance:
            faults.of(faults.extend, trial.training_faults(records, config.train_of(name).max_length, advance))
    for name, records in graded.items() if trial is not None else ():
        with progress_bar(f"check questions: {name}", len(records)) as advance:
            faults.of(faults.extend, trial.question_faults(records, benchmark.graded(name), advance))
    return shown


def _drawing() -> Callable[[int, int], None]:
    """Tell the progress of data that is drawn at first use, in the log at every fifth of the way."""
    told: set[int] = set()

    def progress(done: int, total: int) -> None:
        fifth = 5 * done // max(total, 1)
        if fifth not in told:
            told.add(fifth)
            log.info("drawing the benchmark's pictures: %d %%", 20 * fifth)

    return progress
