"""What makes two runs the same: config, data, base and versions, as a run records them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mllm_keeplora.config import EXPONENT, RunConfig, flatten, result_defining
from mllm_keeplora.data import PATHS, Benchmark, Domain, Suite, with_published_epochs
from mllm_keeplora.data.readers import digest
from mllm_keeplora.system.plugins import version_of

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "pillow", "torchvision")


def comparable(config: RunConfig) -> dict[str, Any]:
    """Result-defining keys that are compared as they are; domains are compared by their definitions instead."""
    by_definition = {"domains", "benchmark", "train", "per_domain"}
    return {key: value for key, value in config.result_defining().items() if key.split(".")[0] not in by_definition}


def recorded(record: dict[str, Any]) -> dict[str, Any]:
    """The comparable keys of a record; a key that came later has the value that everything had before it.

    An option that a YAML has as 1e5 was kept as a string once.
    """
    stored = {"eval.split": "test", **record["config"]}
    for key, value in stored.items():
        if key.startswith("strategy.") and isinstance(value, str) and EXPONENT.match(value):
            stored[key] = float(value)
    return stored


def domain_record(config: RunConfig, benchmark: Benchmark, name: str) -> dict[str, Any]:
    """A domain as the run records it: its files and how it is trained."""
    train = with_published_epochs(config, benchmark).train_of(name)
    return {**graded_record(benchmark, name), "train": result_defining(train)}


def graded_parts(benchmark: Benchmark) -> list[dict[str, Any]]:
    """Domains and suites with the digests of their files, as a run records them."""
    return [graded_record(benchmark, name) for name in [*benchmark.domains, *benchmark.suites]]


def graded_record(benchmark: Benchmark, name: str) -> dict[str, Any]:
    """A domain or suite with absolute paths and the digests of its files."""
    part = benchmark.graded(name)
    values = part.model_dump()
    for key in PATHS:
        if values.get(key) is not None:
            values[key] = str((benchmark.root / values[key]).resolve())
    graded = "test" if name in benchmark.suites else benchmark.split
    read = ("train", graded, "references")
    digests = {key: digest(Path(values[key])) for key in read if values.get(key) is not None}
    return {"name": name, "files": values, "sha256": digests}


def part_differences(old: dict[str, Any], new: dict[str, Any], origin: str) -> list[str]:
    """Where a recorded domain or suite differs from the config's; files may move, their content may not change."""
    name = old["name"]
    lines = []
    kind = Domain if "train" in new["files"] else Suite  # an older run may not have recorded what had its default
    defaults = {key: each.default for key, each in kind.model_fields.items() if not each.is_required()}
    old = {**old, "files": {**defaults, **old["files"]}}
    for key, prefix in (("files", f"{name}."), ("train", f"{name}.train.")):
        before, after = (flatten(_without_paths(each.get(key, {})), prefix) for each in (old, new))
        lines += differences(before, after, origin)
    if old["sha256"] != new["sha256"]:
        lines.append(f"{name}: its data files are not those that the run was started with")
    return lines


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in PATHS}


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """Result-defining keys of a run's record without name and seed; training keys by domain only where they differ."""
    found = {key: value for key, value in record["config"].items() if key not in {"name", "seed"}}
    if record["parent"] is not None:
        found["parent"] = f"{record['parent']['run']} after {record['parent']['after']}"
    for key in {key: None for each in record["domains"] for key in each["train"]}:
        values = {each["name"]: each["train"].get(key) for each in record["domains"]}
        if len({repr(value) for value in values.values()}) == 1:
            found[f"train.{key}"] = next(iter(values.values()))
        else:
            found.update({f"{name}.train.{key}": value for name, value in values.items()})
    return found


def digest_of_data(parts: Sequence[Mapping[str, Any]]) -> str:
    """One digest of what domains and suites are learnt from and graded by, whatever their order and place on disk.

    Args:
        parts: as a run records them: `name`, `files` (paths and rules of grading), `sha256` of the JSON files.
    """
    told = []
    for part in sorted(parts, key=lambda part: part["name"]):
        rules = sorted((key, value) for key, value in part["files"].items() if key not in PATHS)
        told.append([part["name"], rules, sorted(part["sha256"].items())])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def environment() -> dict[str, str]:
    """Versions that can move a number."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "mllm_keeplora": _version("mllm-keeplora"),
    }
    return found | {name: version for name in LIBRARIES if (version := _version(name))}


def plugin_versions(config: RunConfig) -> dict[str, str]:
    """Version and digest of each of a run's plugins, by its name."""
    return {name: version_of(name) for name in config.plugins}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def differences(before: dict[str, Any], after: dict[str, Any], origin: str) -> list[str]:
    """One line for each key that two flattened configs do not share."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if old != new:
            lines.append(f"{key}: {old!r} in {origin}, {new!r} now")
    return lines
