"""What makes two runs the same, two trainings, or two sets of answers: one object, and how differences are told."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from mllm_keeplora.config import RunConfig, flatten, later_defaults
from mllm_keeplora.data import PATHS, Benchmark, Domain, Suite, with_published_epochs
from mllm_keeplora.runs import Ledger, SetEntry
from mllm_keeplora.system.plain_yaml import EXPONENT

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "pillow", "torchvision")


@dataclass(frozen=True)
class Identity:
    """What a run is known by: it is the same run as long as these are the same. They are recorded in `run.json`.

    Attributes:
        config: result-defining keys by dotted name, without those of domains: `domains` has their files and digests.
        base: fingerprint of the base's weights; None of a hub's base that has not been loaded yet.
        domains: in order, each as `described_set` has it, and in `train` how it is trained.
        suites: as `described_set` has them.
        generator: name of drawn data; None where the data is somebody's own.
    """

    config: Mapping[str, Any]
    base: str | None
    domains: tuple[SetEntry, ...]
    suites: tuple[SetEntry, ...]
    generator: str | None

    @classmethod
    def of_config(
        cls,
        config: RunConfig,
        benchmark: Benchmark,
        base: str | None,
        shown: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    ) -> Identity:
        """Identify a run of this config with the data as they are now; reads every data file once.

        Args:
            config, benchmark, base: of the run.
            shown: digests of the pictures, as a check tells them; without them pictures are no part of the identity.
        """
        trained = with_published_epochs(config, benchmark)
        return cls(
            comparable(config),
            base,
            tuple(
                {**described_set(benchmark, name, shown), "train": trained.train_of(name).result_defining()}
                for name in benchmark.domains
            ),
            tuple(described_set(benchmark, name, shown) for name in benchmark.suites),
            benchmark.root.name if benchmark.generator is not None else None,
        )

    @classmethod
    def of_ledger(cls, ledger: Ledger) -> Identity:
        """Identify a run by what it was started with.

        Older ledgers lack keys that came later, which get the value that everything had before; and 1e5 of a YAML
        was a string in them.
        """
        config = {"eval.split": "test", **ledger.config}
        for key, value in config.items():
            if key.startswith("strategy.") and isinstance(value, str) and EXPONENT.match(value):
                config[key] = float(value)
        sets = tuple(ledger.domains), tuple(ledger.suites)
        return cls(config, ledger.base["fingerprint"], *sets, ledger.generator)

    @property
    def sets(self) -> dict[str, SetEntry]:
        """The domains and suites by name."""
        return {each["name"]: each for each in (*self.domains, *self.suites)}

    def differences(self, now: Identity, origin: str, inherited: int = 0) -> list[str]:
        """Say in one line each what is different now; domains may have been appended.

        Args:
            now: what is asked for.
            origin: where this identity comes from, for the lines.
            inherited: number of leading domains that came from another run; how that one learnt them is not compared.
        """
        lines = differences(self.config, now.config, origin)
        if None not in (self.base, now.base) and self.base != now.base:
            lines.append("base: the weights of the base model are not those that the run was started with")
        old, new = ([each["name"] for each in identity.domains] for identity in (self, now))
        if new[: len(old)] != old:
            lines.append(f"domains: {old} in {origin}, {new} now; domains may only be appended")
        for each in (*self.domains[inherited:], *self.suites):
            if each["name"] in now.sets:
                lines += part_differences(each, now.sets[each["name"]], origin)
        return lines

    def graded_like(self, other: Identity) -> set[str]:
        """Name the domains and suites that both grade by the same files and rules, however they are trained."""
        mine, theirs = ({key: {**part, "train": {}} for key, part in each.sets.items()} for each in (self, other))
        return {name for name in mine.keys() & theirs.keys() if not part_differences(mine[name], theirs[name], "")}

    def digest(self, *names: str) -> str:
        """Digest what domains and suites are learnt from and graded by, whatever their order and place on disk.

        Args:
            names: of some of them; none for all.
        """
        told = []
        for name in sorted(names or self.sets):
            part = self.sets[name]
            rules = sorted((key, value) for key, value in part["files"].items() if key not in PATHS)
            told.append([name, rules, sorted(part["sha256"].items())])
        return digest_of(told)

    def told(self) -> dict[str, str | None]:
        """Give what results say of it: `split`, `data` (a digest), `generator`, `base`."""
        split = self.config["eval.split"]
        return {"split": split, "data": self.digest(), "generator": self.generator, "base": self.base}


def digest_of(facts: Any) -> str:
    """Digest JSON values in twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def comparable(config: RunConfig) -> dict[str, Any]:
    """Select the result-defining keys that are compared literally: all but those of domains."""
    by_definition = {"domains", "benchmark", "train", "per_domain"}
    return {key: value for key, value in config.result_defining().items() if key.split(".")[0] not in by_definition}


def described_set(
    benchmark: Benchmark, name: str, shown: Mapping[str, Mapping[str, Sequence[str]]] | None = None
) -> SetEntry:
    """Describe a domain or suite by absolute paths and the digests of its files and, where given, of its pictures."""
    part = benchmark.graded(name)
    values = part.model_dump(exclude={*later_defaults(part), "counts"})
    for key in PATHS:
        if (path := benchmark.file(name, key)) is not None:
            values[key] = str(path.resolve())
    read = ("train", benchmark.file_of(name), "references")
    digests = {key: benchmark.digest_of(name, key) for key in read if values.get(key) is not None}
    if benchmark.naming(name) is not None:
        digests["classes"] = benchmark.digest_of(name, "classes")
    entry: SetEntry = {"name": name, "files": values, "sha256": digests}
    pictures = {file: lines for file, lines in (shown or {}).get(name, {}).items() if any(lines)}
    if pictures:
        entry["pictures"] = {file: digest_of_lines(lines) for file, lines in pictures.items()}
    return entry


def digest_of_lines(lines: Sequence[str]) -> str:
    """Digest texts as the file that holds one on each line (SHA-256)."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def part_differences(old: SetEntry, new: SetEntry, origin: str) -> list[str]:
    """Say where two descriptions of a domain or suite differ; files may move, their content may not change."""
    name, lines = old["name"], []
    kind = Domain if "train" in new["files"] else Suite  # an older run may not have recorded what had its default
    defaults = {key: each.default for key, each in kind.model_fields.items() if not each.is_required()}
    old, new = ({**each, "files": {**defaults, **each["files"]}} for each in (old, new))
    for group, prefix in (("files", f"{name}."), ("train", f"{name}.train.")):
        before, after = (
            flatten({key: value for key, value in each.get(group, {}).items() if key not in PATHS}, prefix)
            for each in (old, new)
        )
        lines += differences(before, after, origin)
    lists, data = zip(*(_apart(each["sha256"], "classes") for each in (old, new)), strict=True)
    if lists[0] != lists[1]:
        lines.append(f"{name}: its classes, prompts or question are not those that the run was started with")
    if data[0] != data[1]:
        lines.append(f"{name}: its data files are not those that the run was started with")
    else:
        lines += [
            f"{name}: its {file} pictures are not those that the run was started with"
            for file in other_pictures(old, new)
        ]
    return lines


def _apart(digests: Mapping[str, str], key: str) -> tuple[str | None, dict[str, str]]:
    return digests.get(key), {name: digest for name, digest in digests.items() if name != key}


def other_pictures(old: SetEntry, new: SetEntry) -> list[str]:
    """Name the files of a domain or suite whose pictures are known of both, and not the same."""
    before, after = old.get("pictures", {}), new.get("pictures", {})
    return [file for file in before if file in after and before[file] != after[file]]


def differences(before: Mapping[str, Any], after: Mapping[str, Any], origin: str) -> list[str]:
    """Say in one line each which keys two flattened configs do not share."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if old != new:
            lines.append(f"{key}: {old!r} in {origin}, {new!r} now")
    return lines


def settings_of(ledger: Ledger) -> dict[str, Any]:
    """Select a run's result-defining keys but name and seed; training keys by domain only where they differ."""
    found = {key: value for key, value in ledger.config.items() if key not in {"name", "seed"}}
    if ledger.parent is not None:
        found["parent"] = f"{ledger.parent['run']} after {ledger.parent['after']}"
    for key in {key: None for each in ledger.domains for key in each["train"]}:
        values = {each["name"]: each["train"].get(key) for each in ledger.domains}
        if len({repr(value) for value in values.values()}) == 1:
            found[f"train.{key}"] = next(iter(values.values()))
        else:
            found.update({f"{name}.train.{key}": value for name, value in values.items()})
    return found


def environment() -> dict[str, str]:
    """Name the versions that can move a number."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["mllm_keeplora"] = _version("mllm-keeplora")
    return found | {name: version for name in LIBRARIES if (version := _version(name))}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
