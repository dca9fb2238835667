"""Find a run's benchmark: a shipped YAML, a file, or the run's own YAML; and the data behind it.

Nothing here knows one benchmark from another; `generator` names a drawer of data that is made at first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mllm_keeplora.config import DomainOverride, RunConfig, find_config, read_yaml
from mllm_keeplora.data.benchmarks import Benchmark, Suite
from mllm_keeplora.errors import UserError, known, several, validation_faults
from mllm_keeplora.metrics import SCORERS, UNGRADED
from mllm_keeplora.system.plugins import ENTERED

DATA_ROOT = "MLLM_KEEPLORA_DATA"
SHIPPED = "mini_dcl"  # one whose folder is that of all shipped ones
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")
GENERATORS: dict[str, str] = {"mini_dcl": "mllm_keeplora.mini.write:ensure_mini_dcl"}


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
        f"{key} names {name!r}; {benchmark.name} has {known(benchmark.domains)} ({whose})"
        for key, names, whose in [("domains", wanted, origin), ("per_domain", config.per_domain, f"run {config.name}")]
        for name in names
        if name not in benchmark.domains
    ]
    faults += [f"domains names {name!r} twice" for name in {n for n in wanted if wanted.count(n) > 1}]
    faults += [
        f"{name!r} is both a domain and a suite ({origin})" for name in benchmark.suites if name in benchmark.domains
    ]
    if config.eval.split == "validation":
        asked = [(name, benchmark.domains[name]) for name in wanted if name in benchmark.domains]
        told = "eval.split is validation, but domain"
        faults += [f"{told} {name} names no validation file ({origin})" for name, part in asked if not part.validation]
        faults += [f"{told} {name} keeps its gold answers for the test set" for name, part in asked if part.references]
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
    elif config.data_root or (os.environ.get(DATA_ROOT) and not _lies_beside(config, benchmark)):
        benchmark.root = Path(config.data_root or os.environ[DATA_ROOT])
    elif benchmark.root == find_config("benchmarks", SHIPPED).parent:
        first = next(iter(benchmark.domains.values()))
        raise UserError(
            f"benchmark {benchmark.name} needs its data: data_root, or {DATA_ROOT}, must be the folder of {first.train}"
        )
    return benchmark


def _lies_beside(config: RunConfig, benchmark: Benchmark) -> bool:
    """Whether the data of a plugin's benchmark lie beside its YAML, wherever those of the shipped ones are."""
    is_plugged = isinstance(config.benchmark, str) and ("BENCHMARKS", config.benchmark) in ENTERED
    return is_plugged and any(map(benchmark.has_training, benchmark.domains))


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
        shared = {key: value for key, value in defaults.items() if group == "domains" or key in Suite.model_fields}
        values[group] = {name: {**shared, **part} for name, part in parts.items()}
    try:
        return Benchmark.model_validate({"root": root, **values}), origin
    except ValidationError as error:
        raise several(validation_faults(error, origin, Benchmark)) from None


def _generate(name: str, origin: str, progress: Callable[[int, int], None] | None) -> Path:
    if name not in GENERATORS:
        raise UserError(f"unknown generator {name!r}; known: {known(GENERATORS)} ({origin})")
    from importlib import import_module

    module, function = GENERATORS[name].split(":")
    return getattr(import_module(module), function)(progress=progress)
