"""Evaluation of a saved run: its model after any domain, asked again or for the first time. Trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mllm_keeplora.adapters import Adapters, adapters_for, merge_for_good
from mllm_keeplora.adapters.placed import PlacedModel
from mllm_keeplora.adapters.stored import is_oracle, past_of
from mllm_keeplora.config import BaseConfig, RunConfig, parse_config, read_yaml
from mllm_keeplora.data import Benchmark, Domain, Suite, TestSet
from mllm_keeplora.data.media.images import digests_of
from mllm_keeplora.data.readers import READERS
from mllm_keeplora.errors import UserError, known, several, validation_faults
from mllm_keeplora.eval.grading import answer_files, answers_to, regrade, stored_percent, stored_rows
from mllm_keeplora.eval.harness import forget_journals
from mllm_keeplora.eval.rows import asked_records, chosen_sets, evaluate_named
from mllm_keeplora.identity import Identity, comparable, differences, digest_of_lines
from mllm_keeplora.models import Base, load_base
from mllm_keeplora.runs import BASE_UNIT, DomainDir, RunDir, SetEntry, Unit
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log
from mllm_keeplora.system.proofs import accept


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
        """The run's model, which answers as it did after any unit."""
        settings = self.config.adapters
        return PlacedModel(adapters_for(self.base, settings.projector, settings.history), self.run)

    @property
    def adapters(self) -> Adapters:
        return self.placed.adapters

    @cached_property
    def benchmark(self) -> Benchmark:
        """The domains and suites as the run recorded them, every path absolute."""
        ledger = self.run.ledger
        domains = {each["name"]: defined(self.run, each, Domain) for each in ledger.domains}
        suites = {each["name"]: defined(self.run, each, Suite) for each in ledger.suites}
        split = self.config.eval.split
        return Benchmark(name=ledger.benchmark, domains=domains, suites=suites, split=split)

    def changed_files(self, name: str) -> dict[str, tuple[Path, str]]:
        """Find files that a set is graded by and that are not those of the run any more.

        Returns:
            Key of the set's settings -> path, and its digest now.
        """
        recorded, part, changed = self.run.ledger.sets[name], self.benchmark.graded(name), {}
        for key in ("test", "validation", "references", "classes"):
            if key in recorded["sha256"] and getattr(part, key, None) is not None:
                path = Path(getattr(part, key))
                if not path.exists():
                    raise UserError(f"{name}: its data file {path} does not exist any more ({self.run.path})")
                if (now := self.benchmark.digest_of(name, key)) != recorded["sha256"][key]:
                    changed[key] = (path, now)
        return changed

    def shows_others(self, name: str) -> bool:
        """Tell whether a set's questions show other pictures now, as far as the run has recorded them."""
        recorded = self.run.ledger.sets[name].get("pictures", {}).get(self.benchmark.file_of(name))
        return recorded is not None and recorded != digest_of_lines(digests_of(self.benchmark.test_records(name)))

    def load(self, after: int | None = None, domain: str | None = None) -> tuple[Any, Any]:
        """Load a plain transformers model with all that the first `after` units learnt merged, and its processor.

        A run on quantised weights gives the same update on the weights before they were quantised.

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
        """The names of the run's domains and suites."""
        return list(self.run.ledger.sets)

    def folder(self, after: int) -> DomainDir:
        return self.run.folder(self.run.units[after - 1] if after else BASE_UNIT)

    def restore(self, after: int | None, asked: str | None = None) -> Any:
        """Bring the model to where the run itself would ask it after so many units.

        Args:
            after: number of units; None for all that are finished.
            asked: the domain or suite that is asked, which matters where each domain has a branch of its own.
        """
        return self.placed.at(self.first(after), asked)

    def refuse_domain(self, domain: str | None, after: int | None) -> None:
        """Raise a UserError if a domain is named that has no branch of its own after so many units."""
        units = self.first(after)
        names = [name for unit in units for name in unit.domains]
        if domain is not None and not is_oracle(self.run, units):
            raise UserError(f"{self.run.path} answers every domain by one model: there is no --domain {domain!r}")
        if domain is not None and domain not in names:
            raise UserError(f"{self.run.path} has no branch for --domain {domain!r}; known: {known(names)}")

    def load_base(self, config: BaseConfig) -> Base:
        """Load the run's base by its config, or by one that differs in dtype or quantisation.

        Raises:
            UserError: its weights are not those that the run was made with.
        """
        parts = self.config.adapters
        return load_base(config, parts.projector, parts.target, self.run.ledger.base["fingerprint"])

    def first(self, after: int | None) -> list[Unit]:
        """Give the first `after` units, None for all that are finished; a UserError if so many are not."""
        finished = self.run.finished_units
        if after is not None and not 0 <= after <= len(finished):
            raise UserError(f"--after must be between 0 and {len(finished)} for {self.run.path}, got {after}")
        return finished[:after]


def defined(run: RunDir, entry: SetEntry, kind: type[TestSet]) -> Any:
    """Give the domain or suite that a run's ledger describes; a UserError if it describes none."""
    try:
        return kind.model_validate(entry["files"])
    except ValidationError as error:
        raise several(validation_faults(error, str(run.ledger_file), kind, prefix=f"{entry['name']}.files.")) from None


def load_run(path: str | Path) -> SavedRun:
    """Open a run directory for reading.

    Raises:
        UserError: the folder is no run, or its config is not the one that it was started with.
    """
    run = RunDir(path).load()
    config = parse_config(read_yaml(run.config_file), origin=str(run.config_file))
    # Where the base is, and what cannot change results, may be edited by hand; a cut file is not filled up by defaults.
    told = differences(Identity.of_ledger(run.ledger).config, comparable(config), str(run.ledger_file))
    lines = [line for line in told if not line.startswith(("base.model:", "output:"))]
    if lines:
        raise UserError(
            "\n  ".join(
                [f"{run.config_file} is not the run's config any more; starting the run again writes it anew:", *lines]
            )
        )
    return SavedRun(run, config)


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
    folder, config, scores = saved.folder(after), saved.config, {}
    benchmark, names = _sets(saved, domains, suite)
    if batch_size is not None:
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": batch_size})})
    # A set must be what is graded under its name already: answers to other questions would be mixed with it or lost.
    for name in names:
        path = folder.predictions(name)
        if name in saved.names:
            for changed, _ in saved.changed_files(name).values():
                raise UserError(
                    f"{name}: {changed} has changed since {saved.run.path} was graded by it; `rescore` grades its "
                    "answers by new gold answers, --suite asks new questions under a name of their own"
                )
            if saved.shows_others(name):
                raise UserError(
                    f"{name}: its {benchmark.file_of(name)} pictures have changed since {saved.run.path} was graded by "
                    "them; --suite asks new questions under a name of their own"
                )
        elif path.is_file() and not answers_to(stored_rows(path), asked_records(benchmark, name, config)):
            raise UserError(
                f"--suite: {path} has answers to another file's questions, which would be lost; give "
                f"{benchmark.suites[name].test} another name"
            )
    benchmark = benchmark.after({each for unit in saved.first(after) for each in unit.domains})
    with saved.run.locked():
        saved.run.adopt()
        for name in names:
            model = saved.restore(after, asked=name)
            facts = evaluate_named(saved.base, model, benchmark, name, config, folder, keep_journal=True)
            scores[name] = facts["score"]
        forget_journals(folder, names)
        saved.run.save()
    return scores


def rescore(run: str | Path | SavedRun) -> list[tuple[str, str, float | None, float | None]]:
    """Grade every stored prediction of a run again by scorers and gold answers as they are now; no model is loaded.

    Gold answers that have changed are noted in the ledger, and are the run's own from then on. Predictions that are not
    those that the run has written are graded as they are, and a warning says so.

    Returns:
        (unit key, set, score in percent before, score now), in the order of the units.

    Raises:
        UserError: stored predictions answer other questions than the data has now; another process works on the run.
    """
    saved = run if isinstance(run, SavedRun) else load_run(run)
    benchmark, changed = saved.benchmark, []
    with saved.run.locked():
        saved.run.adopt()
        for unit in [BASE_UNIT, *saved.run.finished_units]:
            for name in saved.names:
                path, part = saved.run.folder(unit).predictions(name), benchmark.graded(name)
                if not files.is_there(path):
                    continue
                for each in answer_files(path):
                    if fault := accept(each):
                        log.warning("%s; it is graded as it is now", fault)
                before = stored_percent(path, part)
                try:
                    now = regrade(path, part, asked_records(benchmark, name, saved.config))
                except ValueError as error:
                    raise UserError(str(error)) from None
                changed.append((unit.key, name, before, now))
        for name, part in saved.run.ledger.sets.items():
            for key, (path, digest_now) in saved.changed_files(name).items():
                part["sha256"][key] = digest_now
                saved.run.note(f"{name} is graded by {path} as it is now")
                log.info("%s: %s has changed; the run is graded by it from now on", name, path)
        saved.run.save()
    return changed


def _sets(saved: SavedRun, domains: Sequence[str] | None, suite: str | Path | None) -> tuple[Benchmark, list[str]]:
    """Name the sets to ask, in a benchmark that has them: a file becomes a suite of its name."""
    benchmark = saved.benchmark
    if suite is not None and Path(suite).suffix in READERS:
        name = Path(suite).stem
        if not Path(suite).is_file():
            raise UserError(f"--suite: {suite} does not exist")
        if domains is not None:
            raise UserError("--suite FILE asks that file alone; leave out --domains, or name a suite of the run")
        if name in saved.names:
            raise UserError(f"--suite: {suite} would replace the run's own {name!r}; give the file another name")
        parts = list(benchmark.domains.values())
        longest = max(part.max_new_tokens for part in parts)
        part = TestSet(test=str(Path(suite).resolve()), image_mode=parts[0].image_mode, max_new_tokens=longest)
        return benchmark.model_copy(update={"suites": {name: part}}), [name]
    names = domains if suite is None else [*(domains or []), str(suite)]
    return benchmark, chosen_sets(benchmark, names, str(saved.run.path), ", or a .json file")
