"""Every fault of a run's config, strategy options, data and base, found before anything runs and told at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mllm_keeplora.checks.engine import refuse_divided, refuse_merged, try_training_settings, unfit_for
from mllm_keeplora.checks.memory import Estimate, estimate
from mllm_keeplora.checks.records import gold_faults, load_prompt, mixed_faults, token_faults
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark, Record, load_benchmark
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.data.media.images import image_size, unreadable_images
from mllm_keeplora.errors import UserError, first_line, several
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


@dataclass
class Checked:
    """What a faultless config resolves to."""

    strategy: Strategy
    benchmark: Benchmark
    base_location: str
    base_fingerprint: str | None  # None for a hub id, known once it is loaded
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)  # one line for each part of the base


def check_everywhere(config: RunConfig, seen: Collection[str] = ()) -> Checked:
    """`check_run` by all processes of a run: the main one reads the data first, then each looks into its share.

    Raises:
        UserError: on every process, with the faults that all of them found.
    """
    rank, world = distributed.rank(), distributed.world_size()
    if world == 1:
        return check_run(config, seen=seen)
    checked = distributed.main_first(lambda: check_run(config, look_inside=False))
    own: tuple[list[str], int] = [], 0
    try:
        check_run(config, seen=seen, share=(rank, world))
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
    faults: list[str] = []
    uncounted = 0

    def collect(work: Callable[[], Any]) -> Any:
        nonlocal uncounted
        try:
            return work()
        except UserError as error:
            faults.extend(error.sentences)
            uncounted += error.more
            return None

    strategy = collect(lambda: build_strategy(config.strategy, origin=f"run {config.name}"))
    location = collect(lambda: resolve(config.base))
    base_fingerprint = None
    if location is not None and Path(location).is_dir():
        base_fingerprint = collect(lambda: fingerprint(Path(location)))
        collect(lambda: refuse_original_llava(config.base.model, location))
    parts = (collect(lambda: _target_layers(config, location)) if location is not None else None) or []
    stage = collect(lambda: zero_stage(config.deepspeed))
    for refuse in (refuse_merged, partial(refuse_divided, stage=stage), try_training_settings):
        collect(partial(refuse, config))
    benchmark = collect(lambda: load_benchmark(config, _drawing()))
    counts: dict[str, dict[str, int]] = {}
    if benchmark is not None:
        trained, graded = _read_all(benchmark, counts, collect)
        for name in strategy.options.record_sets if strategy is not None else ():
            records = collect(lambda name=name: benchmark.anchor_records(name)) or ()
            trained[f"anchors of {name}"] = [record.first_exchange() for record in records]
        if look_inside:
            rank, world = share
            prompt = collect(lambda: _prompt(config, location)) if location is not None else None
            new = [{n: records for n, records in sets.items() if n not in seen} for sets in (trained, graded)]
            if rank == 0:  # over all sets, whole: engines change, domains are appended, a share may be of one kind
                faults += mixed_faults(trained, graded, prompt, stage, strategy is not None and strategy.joins_domains)
            own = [{n: records[rank::world] for n, records in sets.items()} for sets in new]
            _look_inside(config, benchmark, prompt, *own, faults, collect)
    if strategy is not None:
        faults += unfit_for(config, strategy, stage)
    if faults:
        raise several(faults, more=uncounted)
    return Checked(strategy, benchmark, location, base_fingerprint, counts, parts)


def _target_layers(config: RunConfig, location: str) -> list[str]:
    """Name the base's parts by its config alone; one line for each, none where the base is not on this machine."""
    try:
        model = skeleton(location)
    except ImportError as error:
        raise UserError(f"base {location}: {first_line(error)}") from None
    except (OSError, ValueError) as error:
        log.info("parts are not checked: %s", first_line(error))
        return []
    return summary_of(model, name_parts(model, config.adapters.projector, config.adapters.target))


def memory_of(config: RunConfig, checked: Checked) -> Estimate | None:
    """What a faultless run will take on this machine's device; None where the base cannot be looked at beforehand."""
    import torch

    prompt = load_prompt(checked.base_location, prompt_style(config.base))
    dtype = compute_dtype(config.base.dtype)
    if prompt is None:
        log.info("memory is not estimated: the processor of %s is not on this machine", checked.base_location)
        return None
    try:
        model = skeleton(checked.base_location, dtype)
        parts = name_parts(model, config.adapters.projector, config.adapters.target)
        long, answers = _lengths(prompt, checked.benchmark)
        shape = (long, answers, len(checked.benchmark.domains), dtype, torch.cuda.is_available())
        family = CausalFamily(prompt)
        return estimate(config, checked.strategy, family, model, parts, *shape, distributed.world_size())
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        log.info("memory is not estimated: %s", first_line(error))
        return None


def _lengths(prompt: ChatPrompt, benchmark: Benchmark, looked_at: int = 50) -> tuple[int, int]:
    """Tokens of the longest of some records of every domain, and those that carry loss in the most talkative."""
    some = [r for name in benchmark.domains for r in evenly_spaced(benchmark.train_records(name), looked_at)]
    totals = [prompt.total_tokens(record, [image_size(media) for media in record.media]) for record in some]
    return max(totals), max(prompt.trained_tokens(record) for record in some)


def _prompt(config: RunConfig, location: str) -> ChatPrompt | None:
    prompt = load_prompt(location, prompt_style(config.base))
    if prompt is None:
        log.info("tokens are not checked: the processor of %s is not on this machine", location)
    return prompt


def _token_faults(config: RunConfig, prompt: ChatPrompt, trained: dict[str, Sequence[Record]]) -> list[str]:
    """Training records that train nothing or are too long, of every domain, as its own settings have it."""
    faults: list[str] = []
    for name, records in trained.items():
        with progress_bar(f"check tokens: {name}", len(records)) as advance:
            faults += token_faults(prompt, records, config.train_of(name).max_length, advance)
    return faults


def _read_all(
    benchmark: Benchmark, counts: dict[str, dict[str, int]], collect: Callable
) -> tuple[dict[str, Sequence[Record]], dict[str, Sequence[Record]]]:
    """Records to be trained and to be graded, by domain or suite; what cannot be read is a fault and left out."""
    trained, graded = {}, {}
    for name in benchmark.domains:
        trained[name] = collect(lambda name=name: benchmark.train_records(name)) or ()
        counts[name] = {"train": len(trained[name])}
    for name in [*benchmark.domains, *benchmark.suites]:
        graded[name] = collect(lambda name=name: benchmark.test_records(name)) or ()
        counts.setdefault(name, {})["test"] = len(graded[name])
    return trained, graded


def _look_inside(
    config: RunConfig,
    benchmark: Benchmark,
    prompt: ChatPrompt | None,
    trained: dict[str, Sequence[Record]],
    graded: dict[str, Sequence[Record]],
    faults: list[str],
    collect: Callable,
) -> None:
    """Decode every image, try every gold answer, tokenise every training record; add the faults."""
    parts = [*trained.values(), *graded.values()]
    with progress_bar("check images", sum(map(len, parts))) as advance:
        faults += unreadable_images(chain.from_iterable(parts), advance)
    for name, records in graded.items():
        collect(lambda name=name, records=records: faults.extend(gold_faults(benchmark.graded(name), records)))
    if prompt is not None:
        collect(lambda: faults.extend(_token_faults(config, prompt, trained)))


def _drawing() -> Callable[[int, int], None]:
    """Progress of data that is drawn at first use, told in the log at every fifth of the way."""
    from mllm_keeplora.system.log import log

    told: set[int] = set()

    def progress(done: int, total: int) -> None:
        fifth = 5 * done // max(total, 1)
        if fifth not in told:
            told.add(fifth)
            log.info("drawing the benchmark's pictures: %d %%", 20 * fifth)

    return progress
