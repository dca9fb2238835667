"""The run directory: the only code that builds its paths, and the ledger of stages that are done.

A stage leaves its artefacts first and is then entered in `run.json`; a process killed at any moment loses at most the
stage it was in. Knows no model and no strategy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import NotRequired, TypedDict

from mllm_keeplora.errors import UserError, several, shortened, validation_faults
from mllm_keeplora.system import distributed, files, given, watch

FORMAT = 1
Name = Annotated[str, Field(pattern=given.NAME)]  # of what has files of its name


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
    """Knows a run's folder and, once created or loaded, its ledger."""

    ledger_file = Within("run.json")
    config_file = Within("config.yaml")
    log_file = Within("log.txt")
    results_file = Within("results.json")
    report_file = Within("report.html")
    kept_by_prepare = Within("prepare/basis.safetensors")

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.ledger: Ledger

    def folder(self, unit: Unit) -> DomainDir:
        return DomainDir(self.path / "domains" / unit.key)

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
            raise UserError(f"{self.path} is not a run directory: it has no run.json")
        entered = files.read_json(self.ledger_file, files.OBJECT)
        if entered.get("format") != FORMAT:
            told = shortened(repr(entered.get("format")))
            raise UserError(f"{self.ledger_file} has format {told}; this version reads {FORMAT}")
        try:
            self.ledger = Ledger.model_validate(entered)
        except ValidationError as error:
            raise several(validation_faults(error, str(self.ledger_file), Ledger)) from None
        return self

    def refuse_foreign_content(self) -> None:
        """Refuse a new run's folder that holds more than what a run killed at its very start left."""
        ours = {".lock", "log.txt", "domains", "prepare"}
        entries = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if any(name not in ours and not (name.startswith("run.json.") and name.endswith(".tmp")) for name in entries):
            raise UserError(f"output folder {self.path} is not empty and holds no run; choose another `output`")

    def create(self, ledger: Ledger) -> None:
        """Start a new run with its first ledger."""
        self.refuse_foreign_content()
        self.ledger = ledger
        self.save()

    def save(self) -> None:
        if distributed.is_main():
            files.write_json(self.ledger_file, self.ledger.model_dump())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process (rank 0 of a distributed run); a second one is refused.

        Raises:
            UserError: another process works on the run, or its file system gives no locks.
        """
        if not distributed.is_main():
            yield
            return
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    told = f"no lock on its file system ({error}); choose another `output`"
                    raise UserError(f"run {self.path}: {told}") from None
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                raise UserError(f"run {self.path} is in use by another process (pid {owner})") from None
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            try:
                yield
            finally:
                if not self.exists():  # refused before anything was written: leave no trace
                    (self.path / ".lock").unlink()
                    with contextlib.suppress(OSError):
                        self.path.rmdir()

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


def peak_memory_bytes() -> int:
    """Measure the largest resident size of this process so far, or the GPU's peak if that is larger."""
    import resource

    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(host, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else host


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
