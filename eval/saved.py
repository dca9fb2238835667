"""Evaluation of a saved run: its model after any domain, asked again or for the first time. Trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm_keeplora.adapters import Adapters, adapters_for, merge_for_good
from mllm_keeplora.adapters.placed import PlacedModel
from mllm_keeplora.adapters.stored import is_oracle, past_of
from mllm_keeplora.config import BaseConfig, RunConfig, parse_config, read_yaml
from mllm_keeplora.data import Benchmark, Domain, Suite, TestSet
from mllm_keeplora.data.readers import READERS, digest
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.eval.grading import answers_to, regrade, stored_percent
from mllm_keeplora.eval.harness import forget_journals
from mllm_keeplora.eval.rows import asked_records, evaluate_named
from mllm_keeplora.models import Base, load_base
from mllm_keeplora.runs import BASE_UNIT, DomainDir, RunDir, Unit
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log


@dataclass
class SavedRun:
    """A run directory that is read, not continued."""

    run: RunDir
    config: RunConfig

    @cached_property
    def base(self) -> Base:
        return self.load_base(self.config.base)

    @cached_property
    def placed(self) -> PlacedModel:
        """The run's model as it answers after any unit."""
        settings = self.config.adapters
        return PlacedModel(adapters_for(self.base, settings.projector, settings.history), self.run)

    @property
    def adapters(self) -> Adapters:
        return self.placed.adapters

    @cached_property
    def benchmark(self) -> Benchmark:
        """Domains and suites as the run recorded them, every path absolute."""
        record = self.run.record
        domains = {each["name"]: Domain(**each["files"]) for each in record["domains"]}
        suites = {each["name"]: Suite(**each["files"]) for each in record["suites"]}
        split = self.config.eval.split
        return Benchmark(name=record["benchmark"], domains=domains, suites=suites, split=split)

    def changed_files(self, name: str) -> dict[str, tuple[Path, str]]:
        """Files that a set is graded by and that are not those of the run any more: key -> path, digest now."""
        (recorded,) = (e for e in [*self.run.record["domains"], *self.run.record["suites"]] if e["name"] == name)
        keys = [key for key in ("test", "validation", "references") if key in recorded["sha256"]]
        paths = {key: Path(recorded["files"][key]) for key in keys}
        missing = [path for path in paths.values() if not path.exists()]
        if missing:
            raise UserError(f"{name}: its data file {missing[0]} does not exist any more ({self.run.path})")
        now = {key: digest(path) for key, path in paths.items()}
        return {key: (paths[key], now[key]) for key in keys if now[key] != recorded["sha256"][key]}

    def load(self, after: int | None = None, domain: str | None = None) -> tuple[Any, Any]:
        """Plain transformers model with everything learnt by the first `after` units merged, and its processor.

        Of a run on quantised weights: the same update on the weights before they were quantised.

        Args:
            after: number of units; None for all that are finished, 0 for the base.
            domain: the one to answer, of a run where each has a branch of its own.

        Raises:
            UserError: no single weight stands for the run, because its branches combine by the question; a domain that
                the run does not have, or need.
        """
        self.refuse_domain(domain, after)
        config = self.config.base.model_copy(update={"quantization": None})
        base = self.load_base(config)  # a fresh one: what was handed out before stays as it is
        past = past_of(self.run, self.first(after), domain)
        merge_for_good(base.model, *past.merged("a merged model"))
        return base.model, base.processor

    @property
    def names(self) -> list[str]:
        """Domains and suites of the run."""
        return [each["name"] for each in [*self.run.record["domains"], *self.run.record["suites"]]]

    def folder(self, after: int) -> DomainDir:
        return self.run.folder(self.run.units[after - 1] if after else BASE_UNIT)

    def restore(self, after: int, asked: str | None = None) -> Any:
        """The model as the run itself would ask it after so many units.

        Args:
            after: number of units.
            asked: the domain or suite that is asked, which matters where each domain has a branch of its own.
        """
        return self.placed.at(self.first(after), asked)

    def refuse_domain(self, domain: str | None, after: int | None) -> None:
        """UserError where a person names a domain that has no branch of its own after so many units; None is fine."""
        units = self.first(after)
        names = [name for unit in units for name in unit.domains]
        if domain is None:
            return
        if not is_oracle(self.run, units):
            raise UserError(f"{self.run.path} answers every domain by one model: there is no --domain {domain!r}")
        if domain not in names:
            raise UserError(f"{self.run.path} has no branch for --domain {domain!r}; known: {known(names)}")

    def load_base(self, config: BaseConfig) -> Base:
        """The run's base by its config, or by one that differs in dtype or quantisation.

        Raises:
            UserError: its weights are not those that the run was made with.
        """
        parts = self.config.adapters
        return load_base(config, parts.projector, parts.target, self.run.record["base"]["fingerprint"])

    def first(self, after: int | None) -> list[Unit]:
        """The first `after` units, None for all that are finished; UserError if so many are not."""
        finished = self.run.finished_units
        if after is not None and not 0 <= after <= len(finished):
            raise UserError(f"--after must be between 0 and {len(finished)} for {self.run.path}, got {after}")
        return finished[:after]


def load_run(path: str | Path) -> SavedRun:
    """Open a run directory for reading.

    Raises:
        UserError: the folder is no run.
    """
    run = RunDir(path).load()
    return SavedRun(run, parse_config(read_yaml(run.config), origin=str(run.config)))


def evaluate(
    run: str | Path | SavedRun,
    after: int | None = None,
    domains: Sequence[str] | None = None,
    suite: str | Path | None = None,
    batch_size: int | None = None,
) -> dict[str, float | None]:
    """Ask a saved run's model and grade it; predictions are kept in the run directory.

    Args:
        run: a run directory, or an opened one.
        after: number of learnt units; None for all, 0 for the base model.
        domains: names of domains or suites of the run; None for all of them.
        suite: a suite's name, or a file of test records, which is graded by the `exact` scorer and asked with the
            run's picture mode and longest answers.
        batch_size: questions per forward; None as in the run.

    Returns:
        Set name -> mean score in percent.

    Raises:
        UserError: unknown name, unfinished unit, unreadable data; another process works on the run.
    """
    saved = run if isinstance(run, SavedRun) else load_run(run)
    after = len(saved.first(after))
    benchmark, names = _sets(saved, domains, suite)
    config = saved.config
    if batch_size is not None:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": batch_size})})
    scores = {}
    for name in names:
        _refuse_other_questions(saved, benchmark, name, saved.folder(after).predictions(name))
    with saved.run.locked():
        for name in names:
            model = saved.restore(after, asked=name)
            facts = evaluate_named(saved.base, model, benchmark, name, config, saved.folder(after), keep_journal=True)
            scores[name] = facts["score"]
        forget_journals(saved.folder(after), names)
    return scores


def rescore(run: str | Path | SavedRun) -> list[tuple[str, str, float | None, float | None]]:
    """Grade every stored prediction of a run again by scorers and gold answers as they are now; no model is loaded.

    Gold answers that have changed are noted in the ledger, and are the run's own from then on.

    Returns:
        (unit key, set, score in percent before, score now), in the order of the units.

    Raises:
        UserError: stored predictions answer other questions than the data has now; another process works on the run.
    """
    saved = run if isinstance(run, SavedRun) else load_run(run)
    benchmark, changed = saved.benchmark, []
    with saved.run.locked():
        for unit in [BASE_UNIT, *saved.run.finished_units]:
            folder = saved.run.folder(unit)
            for name in [*benchmark.domains, *benchmark.suites]:
                before = stored_percent(folder.predictions(name), benchmark.graded(name))
                if not folder.predictions(name).is_file():
                    continue
                records = asked_records(benchmark, name, saved.config)
                try:
                    now = regrade(folder.predictions(name), benchmark.graded(name), records)
                except ValueError as error:
                    raise UserError(str(error)) from None
                changed.append((unit.key, name, before, now))
        for part in [*saved.run.record["domains"], *saved.run.record["suites"]]:
            for key, (path, digest_now) in saved.changed_files(part["name"]).items():
                part["sha256"][key] = digest_now
                saved.run.note(f"{part['name']} is graded by {path} as it is now")
                log.info("%s: %s has changed; the run is graded by it from now on", part["name"], path)
    return changed


def _refuse_other_questions(saved: SavedRun, benchmark: Benchmark, name: str, answers: Path) -> None:
    """UserError where a set is not what is graded under its name already."""
    if name in saved.names:
        for path, _ in saved.changed_files(name).values():
            raise UserError(
                f"{name}: {path} has changed since {saved.run.path} was graded by it; `rescore` grades its answers by "
                "new gold answers, --suite asks new questions under a name of their own"
            )
    elif answers.is_file() and not answers_to(
        files.read_json_lines(answers), asked_records(benchmark, name, saved.config)
    ):
        raise UserError(
            f"--suite: {answers} has answers to another file's questions, which would be lost; give "
            f"{benchmark.suites[name].test} another name"
        )


def _sets(saved: SavedRun, domains: Sequence[str] | None, suite: str | Path | None) -> tuple[Benchmark, list[str]]:
    benchmark = saved.benchmark
    if suite is not None and Path(suite).suffix in READERS:
        name = Path(suite).stem
        if not Path(suite).is_file():
            raise UserError(f"--suite: {suite} does not exist")
        if domains is not None:
            raise UserError("--suite FILE asks that file alone; leave out --domains, or name a suite of the run")
        if name in {*benchmark.domains, *benchmark.suites}:
            raise UserError(f"--suite: {suite} would replace the run's own {name!r}; give the file another name")
        parts = benchmark.domains.values()
        part = TestSet(
            test=str(Path(suite).resolve()),
            image_mode=next(iter(parts)).image_mode,
            max_new_tokens=max(part.max_new_tokens for part in parts),
        )
        return benchmark.model_copy(update={"suites": {name: part}}), [name]
    allowed = [*benchmark.domains, *benchmark.suites]
    chosen = list(domains) if domains is not None else allowed
    if suite is not None:
        chosen = [*(domains or []), str(suite)]
    unknown = [name for name in chosen if name not in allowed]
    if unknown:
        raise UserError(
            f"{saved.run.path} has no domain or suite {unknown[0]!r}; known: {known(allowed)}, or a .json file"
        )
    return benchmark, chosen
