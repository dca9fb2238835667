"""Open a run: start it, continue it, extend it by domains, or start from another run's state."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from mllm_keeplora.checks.run import Checked
from mllm_keeplora.config import RunConfig, as_yaml, flatten, read_yaml
from mllm_keeplora.data import Benchmark, Domain
from mllm_keeplora.errors import UserError
from mllm_keeplora.identity import Identity, comparable, differences, environment
from mllm_keeplora.runs import BASE_UNIT, Ledger, RunDir, now
from mllm_keeplora.stages.units import plan_units
from mllm_keeplora.system import distributed, files
from mllm_keeplora.system.log import log
from mllm_keeplora.system.plugins import version_of

ANSWERS = re.compile(r"(?P<name>.+?)(\.figures\.json|(\.submit)?\.jsonl)")  # files of a set's answers
MAY_DIFFER_FROM_PARENT = ("name:", "seed:", "eval.domains:", "eval.zero_shot:")


def open_run(config: RunConfig, checked: Checked, parent: Path | None = None, after: int | None = None) -> RunDir:
    """Create the run directory or accept the one that is there; afterwards `run.ledger` describes this run.

    Args:
        config, checked: the config and what it resolves to; `checked.benchmark` gains inherited domains.
        parent, after: start from the state of another run after its first `after` domains.

    Raises:
        UserError: the folder holds another run (the difference is shown), or the parent does not fit.
    """
    run = RunDir(config.output_dir)
    source = RunDir(parent).load() if parent is not None else None
    if run.exists():  # continued: by the same settings, and from the same parent
        inherited = run.load().ledger.parent
        if source is not None and (inherited or {}).get("run") != str(parent):
            raise UserError(f"{run.path} was not started from {parent}; choose another `output`")
        if source is not None and after not in (None, inherited["after"]):
            raise UserError(
                f"{run.path} was started from {parent} after {inherited['after']} domains, not {after}; choose another "
                "`output`"
            )
        if inherited is not None:
            _inherit_definitions(checked.benchmark, run.ledger.domains[: inherited["after"]])
        base = checked.base_like(run.ledger.base["fingerprint"])
        _accept(run, config, checked, Identity.of_config(config, checked.benchmark, base))
    else:  # new: the ledger is written last, so that a start which is killed leaves no run
        if source is not None:
            _fits_parent(source, config, checked, after)
            _inherit_definitions(checked.benchmark, source.ledger.domains[:after])
        identity = Identity.of_config(config, checked.benchmark, checked.base_fingerprint)
        ledger = _first_ledger(config, checked, identity, source, after or 0)
        if source is not None:
            names = Identity.of_ledger(source.ledger).graded_like(Identity.of_ledger(ledger))
            ledger.stages = _inherit_state(source, run, after, names)
        run.create(ledger)
    if distributed.is_main():
        files.write_text(run.config_file, as_yaml(config.resolved()))
        files.remove_leftovers(run.path)
    return run


def _first_ledger(config: RunConfig, checked: Checked, identity: Identity, source: RunDir | None, after: int) -> Ledger:
    """What a new run is started with."""
    inherited = source.ledger.domains[:after] if source is not None else []
    base = identity.base  # unknown of a hub's before it is loaded; then it must be the parent's
    if base is None and source is not None:
        base = source.ledger.base["fingerprint"]
    return Ledger(
        name=config.name,
        created=now(),
        environment=environment(),
        benchmark=checked.benchmark.name,
        generator=identity.generator,
        base={"name": config.base.model, "fingerprint": base},
        seed=config.seed,
        parent={"run": str(source.path), "after": after} if source is not None else None,
        config=dict(identity.config),
        plugins={name: version_of(name) for name in config.plugins},
        domains=[*inherited, *identity.domains[after:]],
        units=plan_units(list(checked.benchmark.domains), checked.strategy.stream),
        suites=list(identity.suites),
    )


def _accept(run: RunDir, config: RunConfig, checked: Checked, identity: Identity) -> None:
    """Compare an existing run with the config; extend it where domains were appended."""
    ledger, origin = run.ledger, str(run.path)
    inherited = ledger.parent["after"] if ledger.parent is not None else 0
    lines = Identity.of_ledger(ledger).differences(identity, origin, inherited)
    old, new = [each["name"] for each in ledger.domains], list(checked.benchmark.domains)
    if new[: len(old)] == old != new and checked.strategy.stream == "union":
        lines.append(f"domains: {config.strategy.name} learns all domains at once, so none can be appended")
    if lines:
        raise UserError(
            "\n  ".join([f"run {origin} was started with another config; choose another `output`:", *lines])
        )
    for domain in identity.domains[len(old) :]:
        ledger.domains.append(domain)
        run.note(f"domain {domain['name']} appended")
        log.info("domain %s appended to %s", domain["name"], origin)
    ledger.units = plan_units(new, checked.strategy.stream)
    plugins = {name: version_of(name) for name in config.plugins}
    for line in differences(ledger.plugins, plugins, "before"):
        run.note(f"plugin changed: {line}")
        log.warning("plugin changed: %s", line)
    ledger.plugins = plugins
    _forget_lost_answers(run)
    run.save()
    # Keys that cannot change results may differ; that they did is noted.
    asked, defining = flatten(config.resolved()), config.result_defining()
    before = flatten(read_yaml(run.config_file)) if run.config_file.is_file() else asked
    for line in differences(before, asked, "before"):
        if line.split(":")[0] not in defining and not line.startswith(("domains", "benchmark", "per_domain")):
            run.note(f"runtime key changed: {line}")
            log.info("runtime key changed: %s", line)


def _forget_lost_answers(run: RunDir) -> None:
    """Let a set be asked again whose answers somebody took away."""
    for unit in [BASE_UNIT, *run.units]:
        for stage in [stage for stage in run.ledger.stages if stage.startswith(f"{unit.key}/evaluate/")]:
            answers = run.folder(unit).predictions(stage.split("/")[2])
            if not answers.is_file():
                del run.ledger.stages[stage]
                run.note(f"{answers} is gone; {stage} is to be done again")
                log.warning("%s is gone: the questions are asked again", answers)


def _fits_parent(source: RunDir, config: RunConfig, checked: Checked, after: int | None) -> None:
    names = [each["name"] for each in source.ledger.domains]
    if checked.strategy.stream == "union":
        raise UserError(f"--from: strategy {config.strategy.name} learns all domains at once and cannot continue a run")
    if after is None or not 1 <= after <= len(names):
        raise UserError(f"--after must be between 1 and {len(names)} for {source.path}, got {after}")
    if after > len(source.finished_units):
        raise UserError(f"--from {source.path}: domain {names[after - 1]} (--after {after}) is not finished there")
    recorded = source.ledger.base["fingerprint"]
    if checked.base_like(recorded) not in (None, recorded):
        raise UserError(f"--from {source.path}: its base model is not {config.base.model} as it is now")
    told = differences(Identity.of_ledger(source.ledger).config, comparable(config), str(source.path))
    lines = [line for line in told if not line.startswith(MAY_DIFFER_FROM_PARENT)]
    if lines:
        raise UserError("\n  ".join([f"--from {source.path}: its state does not fit this config:", *lines]))


def _inherit_definitions(benchmark: Benchmark, inherited: list[dict[str, Any]]) -> None:
    """Put inherited domains, as the parent defined them, before the config's own."""
    names = [each["name"] for each in inherited]
    own = list(benchmark.domains)
    if own[: len(names)] != names and set(own) & set(names):
        raise UserError(f"--from: the config's domains {own} neither begin with the inherited {names} nor avoid them")
    before = {each["name"]: Domain(**each["files"]) for each in inherited}
    for name, domain in before.items():
        graded = domain.test if benchmark.split == "test" else domain.validation
        if not (Path(domain.train).is_file() and graded is not None and Path(graded).is_file()):
            raise UserError(f"--from: inherited domain {name} needs its data at {domain.train} and {graded}")
    benchmark.domains = {**before, **{name: benchmark.domains[name] for name in own if name not in before}}


def _inherit_state(source: RunDir, run: RunDir, after: int, names: set[str]) -> dict[str, Any]:
    """Copy what base and inherited units left, so that the parent is not needed afterwards; give their ledger entries.

    Args:
        names: domains and suites whose evaluations are inherited.
    """
    units = [BASE_UNIT, *source.units[:after]]

    def passed_over(folder: str, entries: list[str]) -> set[str]:
        unfinished = {entry for entry in entries if entry == "checkpoints" or entry.endswith((".part", ".tmp"))}
        answers = filter(None, map(ANSWERS.fullmatch, entries))
        return unfinished | {match.string for match in answers if match["name"] not in names}

    if distributed.is_main():
        run.refuse_foreign_content()
        folders = {source.kept_by_prepare.parent: run.kept_by_prepare.parent}
        folders |= {source.folder(unit).path: run.folder(unit).path for unit in units}
        for before, now in folders.items():
            if before.is_dir():
                shutil.copytree(before, now, ignore=passed_over, dirs_exist_ok=True)
    kept, keys = {}, {unit.key for unit in units}
    for stage, entry in source.ledger.stages.items():
        unit, _, rest = stage.partition("/")
        kind, _, graded = rest.partition("/")
        if stage == "prepare" or (unit in keys and (kind != "evaluate" or graded in names)):
            kept[stage] = entry
    return kept
