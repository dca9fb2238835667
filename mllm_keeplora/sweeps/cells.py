"""Cells of a sweep: runs as processes of their own, several side by side, none of them run twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mllm_keeplora.config import RunConfig, load_config, parse_config, read_yaml
from mllm_keeplora.errors import STOPPED
from mllm_keeplora.eval.results import Results
from mllm_keeplora.system.log import log

# A run that a signal ended, before or after it could see to it: it is not at fault, and goes on later.
INTERRUPTED = {STOPPED, *(code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number))}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    run: str
    overrides: tuple[str, ...]
    folder: Path

    def config(self) -> RunConfig:
        return load_config(self.run, self.overrides)

    def results(self) -> Results | None:
        """Its results if it is finished under this very config; None if it must be started or continued."""
        config, stored = self.config(), self.folder / "config.yaml"
        if not (self.folder / "results.json").is_file() or not stored.is_file():
            return None
        before = parse_config(read_yaml(stored), origin=str(stored))
        results = Results.load(self.folder / "results.json")
        same = before.result_defining() == config.result_defining()
        return results if same and results.complete else None


class Runner:
    """Runs cells as processes of their own, so that a failing one takes nothing with it.

    Args:
        jobs: runs side by side, each with its share of the cores; None is one for each device, one where there is none.
        devices: GPUs as CUDA_VISIBLE_DEVICES names them; a run sees one of them. Runs share them if there are more.
    """

    def __init__(self, jobs: int | None = None, devices: Sequence[str] = ()):
        self.jobs = jobs or max(1, len(devices))
        self.threads = max(1, (os.cpu_count() or 1) // self.jobs)
        self.processes: set[subprocess.Popen] = set()
        self.over = False  # a run was stopped: no other is started
        self.places: SimpleQueue[dict[str, str]] = SimpleQueue()  # what the environment of a run adds
        for index in range(self.jobs):
            self.places.put({"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} if devices else {})

    def run(self, cells: Sequence[Cell], title: str) -> list[Results | None]:
        """Results of every cell in order; None where a run failed, of whatever. What is finished is not run again.

        A failure is told when it happens, and the others go on: what one run met (a full GPU, a strategy's refusal, a
        file system that was away for a moment) need not be what the next one meets.

        Raises:
            KeyboardInterrupt: this process or a run was told to stop; all are stopped, and may be continued.
        """
        done = {cell: results for cell in cells if (results := cell.results()) is not None}
        todo = [cell for cell in cells if cell not in done]
        if todo:
            log.info("%s: %d runs to do, %d done, %d side by side", title, len(todo), len(done), self.jobs)
        started, told = time.monotonic(), _Countdown(title, len(todo))
        pool = ThreadPoolExecutor(self.jobs)
        try:
            with _terminated_like_interrupted():
                futures = {pool.submit(self._run_one, cell, told, started): cell for cell in todo}
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, or a free worker would start the next run
            ended = list(self.processes)
            for process in ended:
                process.terminate()
            for process in ended:  # here, too: a worker that was just being started is not one that shutdown waits for
                process.wait()
            self.processes.difference_update(ended)
            raise
        finally:
            pool.shutdown()
        return [done[cell] for cell in cells]

    def _run_one(self, cell: Cell, told: _Countdown, started: float) -> Results | None:
        own = [f"threads={self.threads}"] if self.jobs > 1 else []
        command = [sys.executable, "-m", "mllm_keeplora", "run", cell.run, *cell.overrides, *own]
        if self.over:
            raise KeyboardInterrupt
        began = time.monotonic()
        code = self._process(command, log_of(cell.folder))
        if code in INTERRUPTED:
            self.over = True
            raise KeyboardInterrupt
        results = cell.results() if code == 0 else None
        told(cell, results, code, time.monotonic() - began, time.monotonic() - started)
        return results

    def _process(self, command: list[str], log_file: Path) -> int:
        """Run a command on a free device, what it says at the end of `log_file`; returns its exit code."""
        log_file.parent.mkdir(parents=True, exist_ok=True)
        place = self.places.get()
        try:
            with open(log_file, "a", encoding="utf-8") as output:
                environment = {**os.environ, **place}
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
                self.processes.add(process)
                code = process.wait()
                self.processes.discard(process)
        finally:
            self.places.put(place)
        return code


class _Countdown:
    """Says how each run ended and how long the rest will take."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.ended = title, total, 0

    def __call__(self, cell: Cell, results: Results | None, code: int, seconds: float, elapsed: float) -> None:
        self.ended += 1
        left = elapsed / self.ended * (self.total - self.ended)
        outcome = f"failed with code {code}, see {log_of(cell.folder)}: {_last_line(log_of(cell.folder))}"
        if results is not None:
            last, bwt = results.metrics.get("last"), results.metrics.get("bwt")
            outcome = f"Last {_text(last)}, BWT {_text(bwt)}"
        log.info(
            "%s %d/%d %s: %s (%.0f min %02.0f s); about %.0f min left",
            self.title, self.ended, self.total, cell.folder.name, outcome, seconds // 60, seconds % 60, left / 60,
        )  # fmt: skip


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the runs as Ctrl-C does; a sweep that just died would leave them running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return (named if any(named) else [str(index) for index in range(count)])[:count]


def log_of(folder: Path) -> Path:
    """Where the process of a cell says what it says."""
    return folder.with_name(f"{folder.name}.log")


def _last_line(path: Path) -> str:
    """What a log ends with; empty if there is none."""
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.1f}"
