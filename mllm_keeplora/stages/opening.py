"""Open a run: start it, continue it, extend it by domains, or start from another run's state."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_keeplora.checks.run import Checked
from mllm_keeplora.config import RunConfig, as_yaml, flatten, read_yaml
from mllm_keeplora.data import Benchmark, Domain
from mllm_keeplora.data.media.images import DIGITS
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.grading import answer_paths
from mllm_keeplora.identity import Identity, comparable, differences, digest_of_lines, environment, other_pictures
from mllm_keeplora.runs import BASE_UNIT, Ledger, RunDir, StageEntry, now, stage_of
from mllm_keeplora.stages.redo import redo
from mllm_keeplora.stages.units import plan_units
from mllm_keeplora.system import distributed, files
from mllm_keeplora.system.log import log
from mllm_keeplora.system.plugins import version_of
from mllm_keeplora.system.proofs import prove

ANSWERS = re.compile(r"(?P<name>.+?)(\.figures\.json|(\.submit)?\.jsonl)")  # files of a set's answers
MAY_DIFFER_FROM_PARENT = ("name:", "seed:", "eval.domains:", "eval.zero_shot:")


def open_run(
    config: RunConfig,
    checked: Checked,
    parent: Path | None = None,
    after: int | None = None,
    stage: str | None = None,
) -> RunDir:
    """Create the run directory or accept the one that is there; afterwards `run.ledger` describes this run.

    Args:
        config, checked: the config and what it resolves to; `checked.benchmark` gains inherited domains.
        parent, after: start from the state of another run after its first `after` domains.
        stage: of the run that is there, to go back to.

    Raises:
        UserError: the folder holds another run (the difference is shown), or the parent does not fit; the stage is not
            done.
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
        _accept(run, config, checked, _identity(config, checked, base))
        if stage is not None:
            redo(run, stage)
    elif stage is not None:
        raise UserError(f"--redo {stage}: there is no run in {run.path} yet")
    else:  # new: the ledger is written last, so that a start which is killed leaves no run
        if source is not None:
            _fits_parent(source, config, checked, after)
            _inherit_definitions(checked.benchmark, source.ledger.domains[:after])
        identity = _identity(config, checked, checked.base_fingerprint)
        ledger = _first_ledger(config, checked, identity, source, after or 0)
        if source is not None:
            names = Identity.of_ledger(source.ledger).graded_like(Identity.of_ledger(ledger))
            ledger.stages, ledger.artefacts = _inherit_state(source, run, after, names)
        run.create(ledger)
        _keep_digests(run, ledger, checked)
    if distributed.is_main():
        files.write_text(run.config_file, as_yaml(config.resolved()))
        files.remove_leftovers(run.path)
    return run


def _identity(config: RunConfig, checked: Checked, base: str | None) -> Identity:
    return Identity.of_config(config, checked.benchmark, base, checked.shown)


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
        artefacts={},
    )


def _accept(run: RunDir, config: RunConfig, checked: Checked, identity: Identity) -> None:
    """Compare an existing run with the config; extend it where domains were appended."""
    ledger, origin = run.ledger, str(run.path)
    inherited = ledger.parent["after"] if ledger.parent is not None else 0
    lines = Identity.of_ledger(ledger).differences(identity, origin, inherited)
    lines += _named_pictures(run, checked, identity, inherited)
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
    _enter_pictures(run, identity)
    _keep_digests(run, ledger, checked)
    _forget_lost_answers(run)
    run.adopt()
    run.save()
    # Keys that cannot change results may differ; that they did is noted.
    asked, defining = flatten(config.resolved()), config.result_defining()
    try:
        before = flatten(read_yaml(run.config_file)) if files.is_there(run.config_file) else asked
    except UserError as error:
        log.warning("%s", error)
        before = asked
    for line in differences(before, asked, "before"):
        if line.split(":")[0] not in defining and not line.startswith(("domains", "benchmark", "per_domain")):
            run.note(f"runtime key changed: {line}")
            log.info("runtime key changed: %s", line)


def _named_pictures(run: RunDir, checked: Checked, identity: Identity, inherited: int) -> Iterator[str]:
    """Name a picture of each file of records whose pictures are other ones now, if the run's folder tells which."""
    benchmark = checked.benchmark
    for entry in (*run.ledger.domains[inherited:], *run.ledger.suites):
        name = entry["name"]
        for file in other_pictures(entry, identity.sets[name]) if name in identity.sets else ():
            path, now = run.shown(name, file), checked.shown[name][file]
            before = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
            if digest_of_lines(before) != entry["pictures"][file] or len(before) != len(now):
                continue
            records = benchmark.train_records(name) if file == "train" else benchmark.test_records(name)
            others = [place for place, line in enumerate(now) if line != before[place]]
            record, was, is_now = records[others[0]], before[others[0]], now[others[0]]
            starts = range(0, len(is_now), DIGITS)
            picture = next(start for start in starts if not was.startswith(is_now[: start + DIGITS])) // DIGITS
            more = f", and those of {len(others) - 1} more records" if len(others) > 1 else ""
            yield f"{name}: another picture is {record.media[picture].path} of {record.origin}{more}"


def _enter_pictures(run: RunDir, identity: Identity) -> None:
    """Let a run of an older version know its pictures from now on."""
    late = []
    for entry in (*run.ledger.domains, *run.ledger.suites):
        pictures = identity.sets.get(entry["name"], {}).get("pictures", {})
        if pictures and "pictures" not in entry:
            entry["pictures"] = pictures
            late.append(entry["name"])
    if late:
        told = "were not recorded when it was started; those that are here now are the run's from now on"
        run.note(f"pictures of {', '.join(late)} {told}")
        log.warning("%s: the pictures of %s %s", run.path, ", ".join(late), told)


def _keep_digests(run: RunDir, ledger: Ledger, checked: Checked) -> None:
    """Keep the digest of every picture, so that one which is replaced can be named."""
    for entry in (*ledger.domains, *ledger.suites) if distributed.is_main() else ():
        for file, digest in entry.get("pictures", {}).items():
            path, lines = run.shown(entry["name"], file), checked.shown.get(entry["name"], {}).get(file, [])
            if not path.is_file() and digest_of_lines(lines) == digest:
                files.write_text(path, "".join(f"{line}\n" for line in lines))


def _forget_lost_answers(run: RunDir) -> None:
    """Let a set be asked again whose answers somebody took away."""
    for unit in [BASE_UNIT, *run.units]:
        for stage in [stage for stage in run.ledger.stages if stage.startswith(f"{unit.key}/evaluate/")]:
            answers = run.folder(unit).predictions(stage.split("/")[2])
            if not answers.is_file():
                del run.ledger.stages[stage]
                for path in answer_paths(answers):
                    (run.ledger.artefacts or {}).pop(path.relative_to(run.path).as_posix(), None)
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
        if not (Path(domain.train).exists() and graded is not None and Path(graded).exists()):
            raise UserError(f"--from: inherited domain {name} needs its data at {domain.train} and {graded}")
    benchmark.domains = {**before, **{name: benchmark.domains[name] for name in own if name not in before}}


def _inherit_state(
    source: RunDir, run: RunDir, after: int, names: set[str]
) -> tuple[dict[str, StageEntry], dict[str, str]]:
    """Copy what base and inherited units left, so that the parent is not needed afterwards.

    Args:
        names: domains and suites whose evaluations are inherited.

    Returns:
        Their stages and artefacts, for the ledger.

    Raises:
        UserError: an artefact of the parent is lost or changed; nothing is copied then.
    """
    units = [BASE_UNIT, *source.units[:after]]

    def passed_over(folder: str, entries: list[str]) -> set[str]:
        unfinished = {entry for entry in entries if entry == "checkpoints" or entry.endswith((".part", ".tmp"))}
        answers = filter(None, map(ANSWERS.fullmatch, entries))
        return unfinished | {match.string for match in answers if match["name"] not in names}

    kept, keys = {}, {unit.key for unit in units}
    for stage, entry in source.ledger.stages.items():
        unit, _, rest = stage.partition("/")
        kind, _, graded = rest.partition("/")
        if stage == "prepare" or (unit in keys and (kind != "evaluate" or graded in names)):
            kept[stage] = entry
    known = source.ledger.artefacts or {}
    artefacts = {name: known[name] for name in known if stage_of(name) in kept}
    if distributed.is_main():
        run.refuse_foreign_content()
        for name in artefacts:
            prove(source.path / name)
        folders = {source.kept_by_prepare.parent: run.kept_by_prepare.parent}
        folders |= {source.folder(unit).path: run.folder(unit).path for unit in units}
        for before, now in folders.items():
            if before.is_dir():
                files.make_folder(now.parent)
                shutil.copytree(before, now, ignore=passed_over, dirs_exist_ok=True)
                files.flush_all(now)
                files.flush(now.parent)
    return kept, artefacts
