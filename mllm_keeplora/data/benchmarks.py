"""A benchmark: a named, ordered collection of domains, from a shipped YAML, a file, or the run's own YAML.

Nothing here knows one benchmark from another; `generator` names a drawer of data that is made at first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mllm_keeplora.config import DomainOverride, RunConfig, find_config, read_yaml, validation_faults
from mllm_keeplora.data.readers import read_test, read_train
from mllm_keeplora.data.references import with_references
from mllm_keeplora.data.schema import Record
from mllm_keeplora.data.store import Records
from mllm_keeplora.errors import UserError, known, several
from mllm_keeplora.metrics import SCORERS, UNGRADED

DATA_ROOT = "MLLM_KEEPLORA_DATA"
SHIPPED = "mini_dcl"  # one whose folder is that of all shipped ones
OTHERS = "*"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")
PATHS = (
    "train",
    "validation",
    "test",
    "anchors",
    "images",
    "train_images",
    "references",
)  # keys of a domain that say where, not what or how


class TestSet(BaseModel):
    """Graded questions: files, scorer and how the prompt is put. Paths are relative to the benchmark's root."""

    __test__ = False  # not a test class, whatever pytest thinks of the name
    model_config = ConfigDict(extra="forbid", frozen=True)
    test: str
    images: str | None = Field(
        None, description="folder that image paths are relative to; null = the test file's folder"
    )
    image_mode: Literal["processor", "pad"] = Field(
        "processor", description="pad: to a square in the processor's mean colour, as LLaVA-1.5 does"
    )
    scorer: str = "exact"
    prompt_suffix: str | dict[str, str] = Field(
        "",
        description="appended to the question; a mapping gives gold answers (A|B) suffixes of their own, * to others",
    )
    max_new_tokens: int = Field(16, ge=1)
    references: str | None = Field(None, description="file with the gold answers, where they are kept apart")

    def suffix_for(self, record: Record) -> str:
        """What is appended to a record's question."""
        if isinstance(self.prompt_suffix, str):
            return self.prompt_suffix
        for golds, suffix in self.prompt_suffix.items():
            if record.answer in golds.split("|"):
                return suffix
        return self.prompt_suffix.get(OTHERS, "")


class Suite(TestSet):
    """A held-out set that is graded after every domain; `anchors` are training records of the same kind of ability."""

    anchors: str | None = None


class Domain(TestSet):
    """One member of the sequence with its train and test set."""

    train: str
    train_images: str | None = Field(None, description="as `images`, where training pictures lie elsewhere")
    validation: str | None = None
    epochs: float | None = Field(None, gt=0.0, description="as published; used where the run does not say")


class Benchmark(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = "own"
    title: str = ""
    generator: str | None = None
    defaults: dict[str, Any] = Field(default_factory=dict)
    domains: dict[str, Domain]
    orders: dict[str, list[str]] = Field(default_factory=dict, description="official sequences by name")
    suites: dict[str, Suite] = Field(default_factory=dict)
    anchor_suites: dict[str, Suite] = Field(default_factory=dict, exclude=True)  # all suites, whatever is graded
    published: list[dict[str, Any]] = Field(default_factory=list, exclude=True, description="rows for the report")
    root: Path = Path()
    split: Literal["test", "validation"] = "test"

    def train_records(self, domain: str) -> Records:
        part = self.domains[domain]
        path = self.root / part.train
        folder = self.root / part.train_images if part.train_images is not None else self._images(part, path)
        return read_train(path, folder, part.image_mode == "pad")

    def test_records(self, name: str) -> Sequence[Record]:
        """Graded records of a domain or a suite, by its name: its test set, or its validation set by `split`."""
        part = self.graded(name)
        path = self.root / self.graded_file(name)
        kept_apart = part.references is not None or part.scorer in UNGRADED
        records = read_test(path, self._images(part, path), part.image_mode == "pad", not kept_apart)
        return records if part.references is None else with_references(records, self.root / part.references)

    def anchor_file(self, name: str) -> Path:
        """Training records of an anchor set: of a suite that names some, or a file.

        Raises:
            UserError: neither.
        """
        suite = self.anchor_suites.get(name)
        if suite is not None and suite.anchors is not None:
            return self.root / suite.anchors
        having = [known_name for known_name, each in self.anchor_suites.items() if each.anchors is not None]
        if suite is not None or not Path(name).is_file():
            raise UserError(
                f"strategy.anchors names {name!r}; allowed are files of training records"
                + (f" and the suites {known(having)}" if having else "")
            )
        return Path(name)

    def anchor_records(self, name: str) -> Records:
        path = self.anchor_file(name)
        part = self.anchor_suites.get(name)
        if part is None:
            return read_train(path, path.parent)
        return read_train(path, self._images(part, path), part.image_mode == "pad")

    def graded_file(self, name: str) -> str:
        """The file that a domain or suite is graded by, relative to the root."""
        if self.split == "test" or name in self.suites:
            return self.graded(name).test
        file = self.domains[name].validation
        assert file is not None, "load_benchmark refuses a domain without one"
        return file

    def graded(self, name: str) -> TestSet:
        """The domain or suite of that name: whatever can be asked and graded."""
        return self.domains[name] if name in self.domains else self.suites[name]

    def _images(self, part: TestSet, path: Path) -> Path:
        return self.root / part.images if part.images is not None else path.parent


GENERATORS: dict[str, str] = {"mini_dcl": "mllm_keeplora.data.mini.write:ensure_mini_dcl"}


def load_benchmark(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> Benchmark:
    """Resolve the run's benchmark: definition, root folder (drawn first where a generator makes it), chosen domains.

    Raises:
        UserError: unknown benchmark, domain, scorer or generator; a key that does not belong.
    """
    benchmark, origin = _definition(config)
    faults = [
        f"domain or suite {name}: unknown scorer {part.scorer!r}; known: {known(SCORERS)} ({origin})"
        for name, part in [*benchmark.domains.items(), *benchmark.suites.items()]
        if part.scorer not in SCORERS and part.scorer not in UNGRADED
    ]
    wanted = _wanted(config, benchmark, faults, origin)
    faults += [
        f"domains names {name!r}; {benchmark.name} has {known(benchmark.domains)} ({origin})"
        for name in [*wanted, *config.per_domain]
        if name not in benchmark.domains
    ]
    faults += [f"domains names {name!r} twice" for name in {n for n in wanted if wanted.count(n) > 1}]
    faults += [
        f"{name!r} is both a domain and a suite ({origin})" for name in benchmark.suites if name in benchmark.domains
    ]
    if config.eval.split == "validation":
        without = [name for name in wanted if name in benchmark.domains and not benchmark.domains[name].validation]
        faults += [
            f"eval.split is validation, but domain {name} names no validation file ({origin})" for name in without
        ]
    if config.eval.split == "validation":
        apart = [name for name in wanted if name in benchmark.domains and benchmark.domains[name].references]
        faults += [
            f"eval.split is validation, but domain {name} keeps its gold answers for the test set" for name in apart
        ]
    odd = [name for name in [*benchmark.domains, *benchmark.suites] if not NAME.fullmatch(name)]
    faults += [
        f"{name!r} cannot name a domain or suite: letters, digits, dots, - and _ only ({origin})" for name in odd
    ]
    if not wanted:
        faults.append(f"domains is empty; {benchmark.name} has {known(benchmark.domains)}")
    if faults:
        raise several(faults)
    benchmark.domains = {name: benchmark.domains[name] for name in wanted}
    benchmark.split = config.eval.split
    benchmark.anchor_suites = benchmark.suites
    if benchmark.split == "validation":
        benchmark.suites = {}
    if benchmark.generator is not None:
        benchmark.root = _generate(benchmark.generator, origin, progress)
    elif config.data_root or os.environ.get(DATA_ROOT):
        benchmark.root = Path(config.data_root or os.environ[DATA_ROOT])
    elif benchmark.root == find_config("benchmarks", SHIPPED).parent:
        first = next(iter(benchmark.domains.values()))
        raise UserError(
            f"benchmark {benchmark.name} needs its data: data_root, or {DATA_ROOT}, must be the folder of {first.train}"
        )
    return benchmark


def with_published_epochs(config: RunConfig, benchmark: Benchmark) -> RunConfig:
    """The config with epochs for every domain: its own, else the run's, else as published, else one."""
    own = dict(config.per_domain)
    for name, domain in benchmark.domains.items():
        settings = own.get(name, DomainOverride())
        if config.train.epochs is None and domain.epochs is not None and settings.train.get("epochs") is None:
            own[name] = DomainOverride(train={**settings.train, "epochs": domain.epochs})
    train = config.train.model_copy(update={"epochs": config.train.epochs or 1.0})
    return config.model_copy(update={"train": train, "per_domain": own})


def _wanted(config: RunConfig, benchmark: Benchmark, faults: list[str], origin: str) -> list[str]:
    """Domains in the order of the run: as listed, by the name of an order, or as the benchmark has them."""
    if config.domains is None:
        return list(benchmark.domains)
    if isinstance(config.domains, list):
        return config.domains
    if config.domains in benchmark.orders:
        return benchmark.orders[config.domains]
    faults.append(
        f"domains: {benchmark.name} has no order {config.domains!r}; known: {known(benchmark.orders)} ({origin})"
    )
    return list(benchmark.domains)


def _definition(config: RunConfig) -> tuple[Benchmark, str]:
    given = config.benchmark
    if isinstance(given, str):
        path = find_config("benchmarks", given)
        return _parse(read_yaml(path), given, path.parent)
    if isinstance(given, list):
        names = [entry.get("name") for entry in given]
        if not all(isinstance(name, str) for name in names):
            raise UserError("benchmark: every domain of an inline list needs a `name`")
        given = {
            name: {k: v for k, v in entry.items() if k != "name"} for name, entry in zip(names, given, strict=True)
        }
    if "from" in given:
        return _varied(given, f"benchmark of run {config.name}")
    values = given if "domains" in given else {"domains": given}
    return _parse(values, f"benchmark of run {config.name}", Path())


def _varied(given: dict[str, Any], origin: str) -> tuple[Benchmark, str]:
    """A benchmark by name with other defaults or other settings of single domains: `{from: ucit, defaults: {...}}`."""
    changed = {key: value for key, value in given.items() if key != "from"}
    if not set(changed) <= {"defaults", "domains"}:
        raise UserError(
            f"benchmark: beside `from` only defaults and domains may stand, got {sorted(changed)} ({origin})"
        )
    path = find_config("benchmarks", given["from"])
    values = read_yaml(path)
    defaults = changed.get("defaults") or {}
    for name, own in (changed.get("domains") or {}).items():
        if name not in values["domains"]:
            raise UserError(f"benchmark.domains.{name}: {given['from']} has {known(values['domains'])} ({origin})")
        values["domains"][name] = {**values["domains"][name], **own}
    values["defaults"] = {**(values.get("defaults") or {}), **defaults}
    return _parse(values, f"{origin}, from {given['from']}", path.parent)


def _parse(values: dict[str, Any], origin: str, root: Path) -> tuple[Benchmark, str]:
    defaults = values.get("defaults") or {}
    values = dict(values)
    for group in ("domains", "suites"):
        parts = values.get(group) or {}
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise UserError(
                f"{group} must map each name to its files, e.g. Birds: {{train: ..., test: ...}} ({origin})"
            )
        values[group] = {name: {**defaults, **part} for name, part in parts.items()}
    try:
        return Benchmark.model_validate({"root": root, **values}), origin
    except ValidationError as error:
        raise several(validation_faults(error, origin)) from None


def _generate(name: str, origin: str, progress: Callable[[int, int], None] | None) -> Path:
    if name not in GENERATORS:
        raise UserError(f"unknown generator {name!r}; known: {known(GENERATORS)} ({origin})")
    from importlib import import_module

    module, function = GENERATORS[name].split(":")
    return getattr(import_module(module), function)(progress=progress)
