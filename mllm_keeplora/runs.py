"""The run directory: the only code that builds its paths, and the ledger of stages that are done.

A stage leaves its artefacts first and is then entered in `run.json`, with the digests of all that it left; a process
killed at any moment loses at most the stage it was in, and a file that rots is noticed when it is read. Knows no model
and no strategy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import NotRequired, TypedDict

from mllm_keeplora.errors import UserError, several, shortened, validation_faults
from mllm_keeplora.system import distributed, files, given, owners, watch
from mllm_keeplora.system.log import log
from mllm_keeplora.system.proofs import PROOFS, Proofs, digest

FORMAT = 1
Name = Annotated[str, Field(pattern=given.NAME)]  # of what has files of its name
# Which stage leaves a file, by its path in the run directory; first in `gradient.json`, to which later ones add.
LEAVES = {
    r"prepare/.*": "prepare",
    r"domains/(?P<unit>[^/]+)/(init\.safetensors|gradient\.json)": "{unit}/gradient",
    r"domains/(?P<unit>[^/]+)/(adapter/.*|checkpoints/finished\.safetensors)": "{unit}/train",
    r"domains/(?P<unit>[^/]+)/(projector|prototypes)\.safetensors": "{unit}/train",
    r"domains/(?P<unit>[^/]+)/(basis|strategy|mixer|projector_consolidated)\.safetensors": "{unit}/consolidate",
    r"domains/(?P<unit>[^/]+)/adapter_consolidated/.*": "{unit}/consolidate",
    r"domains/(?P<unit>[^/]+)/manifest\.json": "{unit}/consolidate",
    r"domains/(?P<unit>[^/]+)/diagnostics\.json": "{unit}/diagnose",
    r"domains/(?P<unit>[^/]+)/predictions/(?P<set>.+?)(\.figures\.json|(\.submit)?\.jsonl)": "{unit}/evaluate/{set}",
    r"results\.json|report\.html": "report",
    r"config\.yaml|pictures/.*\.txt": "opening",
}


@dataclass(frozen=True)
class Unit:
    """What is trained at once: a place in the sequence (from 1) and the domains trained there together."""

    index: int
    name: Name
    domains: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.index:02d}_{self.name}"


BASE_UNIT = Unit(0, "base", ())


class StageEntry(TypedDict):
    """What a finished stage took, beside facts of its own."""

    __pydantic_config__ = ConfigDict(extra="allow")

    seconds: float
    peak_memory_bytes: int


class SetEntry(TypedDict):
    """A domain or suite as a run knows it: absolute paths and rules, digests of its files, how it is trained."""

    __pydantic_config__ = ConfigDict(extra="allow")

    name: Name
    files: dict[str, Any]
    sha256: dict[str, str]
    pictures: NotRequired[dict[str, str]]  # of a file's records, whose single digests are in `RunDir.shown`
    train: NotRequired[dict[str, Any]]


class BaseEntry(TypedDict):
    """The base that a run started with; a hub's has no fingerprint before it is loaded."""

    name: str
    fingerprint: str | None


class Parent(TypedDict):
    """The run that a run was started from, and how many of its domains are inherited."""

    run: str
    after: int


class Ledger(BaseModel):
    """What `run.json` holds: what the run was started with, and the stages that are done.

    Keys that another version entered are kept.
    """

    model_config = ConfigDict(extra="allow")

    format: int = FORMAT
    stages: dict[str, StageEntry] = Field(default_factory=dict)
    notes: list[dict[str, str]] = Field(default_factory=list)
    name: str
    created: str
    environment: dict[str, str]
    benchmark: str
    generator: str | None = None
    base: BaseEntry
    seed: int
    parent: Parent | None
    config: dict[str, Any]
    plugins: dict[str, str] = Field(default_factory=dict)
    domains: list[SetEntry]
    units: list[Unit]
    suites: list[SetEntry]
    artefacts: dict[str, str] | None = None  # path in the run directory -> sha256; None in runs of older versions

    @property
    def sets(self) -> dict[str, SetEntry]:
        """The domains and suites by name."""
        return {each["name"]: each for each in (*self.domains, *self.suites)}


class Within:
    """Stands for a path below the folder of the object that has it as an attribute."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: Any, owner: type | None = None) -> Any:
        return self if folder is None else folder.path / self.name


@dataclass(frozen=True)
class DomainDir:
    """The paths of what one unit leaves, a domain or all of joint training; `00_base` is the untouched base's."""

    path: Path

    init = Within("init.safetensors")
    adapter = Within("adapter")
    projector = Within("projector.safetensors")
    adapter_consolidated = Within("adapter_consolidated")  # these two answer in the place of the trained ones
    projector_consolidated = Within("projector_consolidated.safetensors")
    prototypes = Within("prototypes.safetensors")
    strategy = Within("strategy.safetensors")
    mixer = Within("mixer.safetensors")
    trained_mixer = Within("adapter/mixer.safetensors")
    manifest = Within("manifest.json")
    basis = Within("basis.safetensors")  # columns that this unit added
    gradient = Within("gradient.json")
    diagnostics = Within("diagnostics.json")
    checkpoints = Within("checkpoints")
    training_state = Within("checkpoints/finished.safetensors")

    def predictions(self, domain: str) -> Path:
        return self.path / "predictions" / f"{domain}.jsonl"


class RunDir:
    """Knows a run's folder and, once created or loaded, its ledger.

    Attributes:
        is_proven: whether the ledger was read as it had been written.
    """

    ledger_file = Within("run.json")
    ledger_copy = Within("run.copy.json")
    config_file = Within("config.yaml")
    log_file = Within("log.txt")
    results_file = Within("results.json")
    report_file = Within("report.html")
    kept_by_prepare = Within("prepare/basis.safetensors")

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.ledger: Ledger
        self.is_proven = True

    def folder(self, unit: Unit) -> DomainDir:
        return DomainDir(self.path / "domains" / unit.key)

    def shown(self, name: str, file: str) -> Path:
        """Name the file of a set's single pictures: digests, a line for each record of `train`, `test`, ..."""
        return self.path / "pictures" / f"{name}.{file}.txt"

    @property
    def units(self) -> list[Unit]:
        """The units of the sequence, finished or not; their order is that of `data/loading.py`."""
        return self.ledger.units

    @property
    def finished_units(self) -> list[Unit]:
        """The leading units that can be loaded: trained and consolidated."""
        return list(takewhile(lambda unit: self.is_done(f"{unit.key}/consolidate"), self.units))

    def exists(self) -> bool:
        return self.ledger_file.is_file()

    def load(self) -> RunDir:
        """Read the ledger of an existing run.

        Raises:
            UserError: the folder is no run, or its ledger is damaged or of another format.
        """
        if not self.exists():
            raise UserError(f"{self.path} is not a run directory: it has no run.json{self._rebuilding()}")
        try:
            self.ledger, self.is_proven = read_ledger(self.ledger_file)
        except UserError as error:
            raise UserError(f"{error}{self._rebuilding()}") from None
        if not self.is_proven:
            log.warning("%s was changed since the run wrote it, or is damaged", self.ledger_file)
        self._know_artefacts()
        return self

    def rebuild(self) -> RunDir:
        """Make a damaged ledger again from its copy; which artefacts prove themselves is for `faults` to tell.

        Raises:
            UserError: the copy is lost or damaged, too.
        """
        self.ledger, self.is_proven = read_ledger(self.ledger_copy)
        if not self.is_proven:
            raise UserError(f"{self.ledger_copy} is damaged, too; start the run anew in another `output`")
        self._know_artefacts()
        self.note("the ledger was made again from its copy")
        return self

    def _rebuilding(self) -> str:
        return f"; `inspect {self.path} --rebuild` makes it again from its copy" if self.ledger_copy.is_file() else ""

    def refuse_foreign_content(self) -> None:
        """Refuse a new run's folder that holds more than what a run killed at its very start left."""
        ours = {".lock", "log.txt", "domains", "pictures", "prepare"}
        entries = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if any(name not in ours and not (name.startswith("run.json.") and name.endswith(".tmp")) for name in entries):
            raise UserError(
                f"output folder {self.path} is not empty and holds no run; choose another `output`{self._rebuilding()}"
            )

    def create(self, ledger: Ledger) -> None:
        """Start a new run with its first ledger."""
        self.refuse_foreign_content()
        self.ledger = ledger
        self._know_artefacts()
        self.save()

    def save(self) -> None:
        """Write the ledger and its copy, with the digest of their content."""
        if distributed.is_main():
            entered = self.ledger.model_dump()
            for path in (self.ledger_file, self.ledger_copy):
                files.write_json(path, {**entered, "sha256": _digest_of(entered)})

    def _know_artefacts(self) -> None:
        """From now on compare what is read below the folder, and enter what is written."""
        if not distributed.is_main() or self.ledger.artefacts is None:
            return
        folder = Path(os.path.abspath(self.path))
        before = PROOFS.get(folder)
        proofs = Proofs(folder, self.ledger.artefacts, lambda name: stage_of(name) is not None, self.save, self.remedy)
        PROOFS[folder] = proofs if before is None else replace(proofs, seen=before.seen)

    def adopt(self) -> None:
        """Take the digests of a run that has none, of an older version, from its files as they are now."""
        if self.ledger.artefacts is not None:
            return
        done = {*self.ledger.stages, "report", "opening"}
        paths = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*") if path.is_file()}
        self.ledger.artefacts = {name: digest(path) for name, path in paths.items() if stage_of(name) in done}
        self._know_artefacts()
        told = f"digests of {len(self.ledger.artefacts)} files are kept from now on; what they were before is not known"
        self.note(told)
        log.info("%s: %s", self.path, told)

    def faults(self) -> list[tuple[str, str]]:
        """Compare all artefacts with their digests: names of those that are lost or changed, and what is wrong."""
        proofs = PROOFS.get(Path(os.path.abspath(self.path)))
        told = [(name, proofs.fault(name)) for name in sorted(self.ledger.artefacts or ())] if proofs else []
        return [(name, fault) for name, fault in told if fault is not None]

    def remedy(self, name: str) -> str:
        """Say how an artefact can be made again."""
        stage = stage_of(name)
        if stage == "report":
            return f"`report {self.path}` makes it again"
        if stage == "opening":
            return "the run writes it again when it is continued"
        if stage not in self.ledger.stages:  # of a file of one's own
            return "`eval --suite` asks its questions again"
        later = "" if is_leaf(stage) else ", and all that came later with it"
        return f"`run ... --redo {stage}` makes it again{later}"

    def forget(self, folder: Path) -> None:
        """Remove a folder that nothing needs any more, and what is known of its files."""
        within = folder.relative_to(self.path).as_posix() + "/"
        gone = [name for name in self.ledger.artefacts or () if name.startswith(within)]
        for name in gone:
            del self.ledger.artefacts[name]
        if gone:
            self.save()
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process (rank 0 of a distributed run); a second one is refused.

        Raises:
            UserError: another process works on the run, or its file system gives no locks.
        """
        if not distributed.is_main():
            yield
            return
        with files.written(self.path):
            lock = owners.take_lock(self.path / ".lock", f"run {self.path}")
        with lock:
            try:
                yield
            finally:
                if not self.exists():  # refused before anything was written: leave no trace
                    (self.path / ".lock").unlink()
                    with contextlib.suppress(OSError):
                        self.path.rmdir()

    def user(self) -> str | None:
        """Name the process that works on the run, "(pid 12) on host"; None where there is none, or it is not known."""
        return owners.holder_of(self.path / ".lock")

    def is_done(self, stage: str) -> bool:
        return stage in self.ledger.stages

    def once(self, stage: str, work: Callable[[], dict[str, Any] | None]) -> bool:
        """Do a stage unless the ledger has it; returns whether it was done now. `work` may return facts to enter."""
        if self.is_done(stage):
            return False
        watch.enter(stage)
        started = time.monotonic()
        facts = work() or {}
        distributed.barrier()
        entry = {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes(), **facts}
        self.ledger.stages[stage] = entry
        self.save()
        distributed.barrier()
        return True

    def note(self, text: str) -> None:
        self.ledger.notes.append({"at": now(), "text": text})
        self.save()

    def seconds_by_kind(self) -> dict[str, float]:
        """Sum the wall seconds of each kind of stage over the sequence: prepare, gradient, train and so on."""
        total: dict[str, float] = {}
        for stage, entry in self.ledger.stages.items():
            kind = stage.split("/")[1] if "/" in stage else stage
            total[kind] = round(total.get(kind, 0.0) + entry["seconds"], 3)
        return total

    def peak_memory_bytes(self) -> int:
        return max((entry["peak_memory_bytes"] for entry in self.ledger.stages.values()), default=0)


def read_ledger(path: Path) -> tuple[Ledger, bool]:
    """Read a ledger, and whether it is as it was written; older ones do not tell.

    Raises:
        UserError: it is damaged or of another format.
    """
    entered = files.read_json(path, files.OBJECT)
    if entered.get("format") != FORMAT:
        raise UserError(f"{path} has format {shortened(repr(entered.get('format')))}; this version reads {FORMAT}")
    told = entered.pop("sha256", None)
    try:
        return Ledger.model_validate(entered), told in (None, _digest_of(entered))
    except ValidationError as error:
        raise several(validation_faults(error, str(path), Ledger)) from None


def _digest_of(entered: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entered, sort_keys=True).encode()).hexdigest()


def stage_of(name: str) -> str | None:
    """Name the stage that leaves a file, by its path in the run directory; None for what is no artefact."""
    for pattern, stage in LEAVES.items():
        if match := re.fullmatch(pattern, name):
            return stage.format(**match.groupdict())
    return None


def is_leaf(stage: str) -> bool:
    """Whether no other stage rests on it: what was measured, not learnt."""
    return stage.split("/")[1:2] in (["diagnose"], ["evaluate"])


def peak_memory_bytes() -> int:
    """Measure the largest resident size of this process so far, or the GPU's peak if that is larger."""
    import resource

    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(host, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else host


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
