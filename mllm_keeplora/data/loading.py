"""Find a run's benchmark: a shipped YAML, a file, or the run's own YAML; and the data behind it.

Nothing here knows one benchmark from another; `generator` names a drawer of data that is made at first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pydantic import ValidationError

from mllm_keeplora.config import DomainOverride, RunConfig, find_config, read_yaml
from mllm_keeplora.data.benchmarks import Benchmark, Suite
from mllm_keeplora.data.layouts import LAYOUTS
from mllm_keeplora.errors import UserError, known, several, shortened, validation_faults
from mllm_keeplora.metrics import SCORERS, UNGRADED
from mllm_keeplora.system import given
from mllm_keeplora.system.plugins import ENTERED

DATA_ROOT = "MLLM_KEEPLORA_DATA"
SHIPPED = "mini_dcl"  # one whose folder is that of all shipped ones
GENERATORS: dict[str, str] = {
    "mini_dcl": "mllm_keeplora.mini.write:ensure_mini_dcl",
    "mini_mtil": "mllm_keeplora.mini.mtil:ensure_mini_mtil",
    "mini_mtil_cells": "mllm_keeplora.mini.mtil:ensure_mini_mtil_cells",
}


def load_benchmark(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> Benchmark:
    """Resolve the run's benchmark: definition, root folder (drawn first where a generator makes it), chosen domains.

    Raises:
        UserError: unknown benchmark, domain, scorer or generator; a key that does not belong; a package that data is
            made from is not installed.
    """
    benchmark, origin = _definition(config)
    faults = list(_faults(config, benchmark, origin))
    if faults:
        raise several(faults)
    benchmark.domains = {name: benchmark.domains[name] for name in _wanted(config, benchmark)}
    benchmark.split = config.eval.split
    benchmark.draw(config.shots, config.seed)
    benchmark.anchor_suites = benchmark.suites
    if benchmark.split == "validation":
        benchmark.suites = {}
    # The data of a plugin's benchmark may lie beside its YAML, wherever those of the shipped ones are.
    is_plugged = isinstance(config.benchmark, str) and ("BENCHMARKS", config.benchmark) in ENTERED
    lies_beside = is_plugged and any(map(benchmark.has_training, benchmark.domains))
    if benchmark.generator in GENERATORS:
        try:
            benchmark.root = resolve_name(GENERATORS[benchmark.generator])(progress=progress)
        except ModuleNotFoundError as error:
            raise UserError(f"benchmark {benchmark.name}: {error}") from None
    elif benchmark.generator is not None:
        raise UserError(f"unknown generator {benchmark.generator!r}; known: {known(GENERATORS)} ({origin})")
    elif config.data_root or (os.environ.get(DATA_ROOT) and not lies_beside):
        benchmark.root = Path(config.data_root or os.environ[DATA_ROOT])
    elif benchmark.root == find_config("benchmarks", SHIPPED).parent:
        first = next(iter(benchmark.domains.values()))
        raise UserError(
            f"benchmark {benchmark.name} needs its data: data_root, or {DATA_ROOT}, must be the folder of {first.train}"
        )
    return benchmark


def _wanted(config: RunConfig, benchmark: Benchmark) -> list[str]:
    """List domains in the order of the run: as named, by the name of an order, or as the benchmark has them."""
    if isinstance(config.domains, list):
        return config.domains
    return benchmark.orders.get(config.domains or "", list(benchmark.domains))


def _faults(config: RunConfig, benchmark: Benchmark, origin: str) -> Iterator[str]:
    """Tell in a sentence each what is wrong with the benchmark, or with what the run wants of it."""
    domains, wanted = benchmark.domains, _wanted(config, benchmark)
    for name, part in [*domains.items(), *benchmark.suites.items()]:
        if part.scorer not in SCORERS and part.scorer not in UNGRADED:
            yield f"domain or suite {name}: unknown scorer {part.scorer!r}; known: {known(SCORERS)} ({origin})"
        if part.layout is not None and part.layout not in LAYOUTS:
            yield f"domain or suite {name}: unknown layout {part.layout!r}; known: {known(LAYOUTS)} ({origin})"
    if isinstance(config.domains, str) and config.domains not in benchmark.orders:
        orders = known(benchmark.orders)
        yield f"domains: {benchmark.name} has no order {config.domains!r}; known: {orders} ({origin})"
    for key, names, whose in (("domains", wanted, origin), ("per_domain", config.per_domain, f"run {config.name}")):
        for name in names:
            if name not in domains:
                yield f"{key} names {name!r}; {benchmark.name} has {known(domains)} ({whose})"
    for name in dict.fromkeys(wanted):
        if wanted.count(name) > 1:
            yield f"domains names {name!r} twice"
    for name in wanted if config.shots is not None else ():
        if name in domains and domains[name].classes is None and domains[name].layout is None:
            yield f"shots counts records of a class, but domain {name} names no `classes` ({origin})"
    for name in benchmark.suites:
        if name in domains:
            yield f"{name!r} is both a domain and a suite ({origin})"
    for name in wanted if config.eval.split == "validation" else ():
        if name in domains and not domains[name].validation:
            yield f"eval.split is validation, but domain {name} names no validation file ({origin})"
        if name in domains and domains[name].references:
            yield f"eval.split is validation, but domain {name} keeps its gold answers for the test set"
    for name in [*domains, *benchmark.suites]:
        if not re.match(given.NAME, name) or name.endswith("\n"):
            told = "letters, digits, dots, - and _ only, at most 100"
            yield f"{shortened(repr(name))} cannot name a domain or suite: {told} ({origin})"
    if not wanted:
        yield f"domains is empty; {benchmark.name} has {known(domains)}"


def with_published_epochs(config: RunConfig, benchmark: Benchmark) -> RunConfig:
    """Fill in a config's epochs for every domain: its own, else the run's, else as published, else one."""
    own = dict(config.per_domain)
    for name, domain in benchmark.domains.items():
        settings = own.get(name, DomainOverride())
        if config.train.epochs is None and domain.epochs is not None and settings.train.get("epochs") is None:
            own[name] = DomainOverride(train={**settings.train, "epochs": domain.epochs})
    train = config.train.model_copy(update={"epochs": config.train.epochs or 1.0})
    return config.model_copy(update={"train": train, "per_domain": own})


def _definition(config: RunConfig) -> tuple[Benchmark, str]:
    """Read the benchmark before anything is chosen of it, and where it comes from."""
    given, origin = config.benchmark, f"benchmark of run {config.name}"
    if isinstance(given, str):
        path = find_config("benchmarks", given)
        return _parse(read_yaml(path), given, path.parent)
    if isinstance(given, list):
        if not all(isinstance(entry.get("name"), str) for entry in given):
            raise UserError("benchmark: every domain of an inline list needs a `name`")
        given = {entry["name"]: {key: value for key, value in entry.items() if key != "name"} for entry in given}
    if "from" not in given:
        return _parse(given if "domains" in given else {"domains": given}, origin, Path())
    # By name with other defaults or other settings of single domains: `{from: ucit, defaults: {...}}`.
    changed = {key: value for key, value in given.items() if key != "from"}
    if not set(changed) <= {"defaults", "domains"}:
        raise UserError(
            f"benchmark: beside `from` only defaults and domains may stand, got {sorted(changed)} ({origin})"
        )
    path = find_config("benchmarks", str(given["from"]))
    values = read_yaml(path)
    domains = _section(values, "domains", str(path))
    for name in _section(changed, "domains", origin):
        if name not in domains:
            raise UserError(f"benchmark.domains.{name}: {given['from']} has {known(domains)} ({origin})")
        own = _section(changed["domains"], name, origin)
        domains[name] = {**_section(domains, name, str(path)), **own}
    values["defaults"] = {**_section(values, "defaults", str(path)), **_section(changed, "defaults", origin)}
    return _parse(values, f"{origin}, from {given['from']}", path.parent)


def _section(values: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    """Give keys and values that stand under a key; none where it is absent."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{key} must hold keys and values, got {shortened(repr(found))} ({origin})")
    return found


def _parse(values: dict[str, Any], origin: str, root: Path) -> tuple[Benchmark, str]:
    values = dict(values)
    defaults = _section(values, "defaults", origin)
    if "candidates" in values:  # of the benchmark: a rule of all its domains
        defaults = {**defaults, "candidates": values.pop("candidates")}
    for group in ("domains", "suites"):
        parts = values.get(group) or {}
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise UserError(
                f"{group} must map each name to its files, e.g. Birds: {{train: ..., test: ...}} ({origin})"
            )
        shared = {key: value for key, value in defaults.items() if group == "domains" or key in Suite.model_fields}
        values[group] = {name: {**shared, **part} for name, part in parts.items()}
    try:
        return Benchmark.model_validate({"root": root, "home": root, **values}), origin
    except ValidationError as error:
        raise several(validation_faults(error, origin, Benchmark)) from None
