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

from mllm_keeplora.config import RunConfig, load_config, parse_config, read_yaml
from mllm_keeplora.errors import STOPPED
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.render.view import score_text
from mllm_keeplora.system.log import log

# A run that a signal ended, before or after it could see to it: it is not at fault, and goes on later.
ENDED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = {STOPPED, *(code for number in ENDED_BY for code in (-number, 128 + number))}


@dataclass(frozen=True)
class Cell:
    """A cell is one run of a sweep."""

    run: str
    overrides: tuple[str, ...]
    folder: Path

    def config(self) -> RunConfig:
        return load_config(self.run, self.overrides)

    def results(self) -> Results | None:
        """Load its results if it is finished under this very config; None if it must be started or continued."""
        stored, path = self.folder / "config.yaml", self.folder / "results.json"
        if not path.is_file() or not stored.is_file():
            return None
        before, results = parse_config(read_yaml(stored), origin=str(stored)), Results.load(path)
        same = before.result_defining() == self.config().result_defining()
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
        """Run the cells that are not finished; returns the results of all in order, None where a run failed.

        A failure is told when it happens, and the others go on: what one run met (a full GPU, a strategy's refusal, a
        file system that was away for a moment) need not be what the next one meets.

        Raises:
            KeyboardInterrupt: this process or a run was told to stop; all are stopped, and may be continued.
        """
        done = {cell: results for cell in cells if (results := cell.results()) is not None}
        todo = [cell for cell in cells if cell not in done]
        if todo:
            log.info("%s: %d runs to do, %d done, %d side by side", title, len(todo), len(done), self.jobs)
        started, pool = time.monotonic(), ThreadPoolExecutor(self.jobs)
        try:
            with _terminated_like_interrupted():
                futures = {pool.submit(self._run_one, cell): cell for cell in todo}
                for ended, future in enumerate(as_completed(futures), start=1):
                    cell = futures[future]
                    done[cell], code, seconds = future.result()
                    left = (time.monotonic() - started) / ended * (len(todo) - ended)
                    log.info(
                        "%s %d/%d %s: %s (%.0f min %02.0f s); about %.0f min left",
                        *(title, ended, len(todo), cell.folder.name, _outcome(cell, done[cell], code)),
                        *(seconds // 60, seconds % 60, left / 60),
                    )
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

    def _run_one(self, cell: Cell) -> tuple[Results | None, int, float]:
        """Run a cell on a free device, what it says at the end of its log; returns results, exit code and seconds."""
        if self.over:
            raise KeyboardInterrupt
        own = [f"threads={self.threads}"] if self.jobs > 1 else []
        command = [sys.executable, "-m", "mllm_keeplora", "run", cell.run, *cell.overrides, *own]
        began, place = time.monotonic(), self.places.get()
        try:
            log_of(cell.folder).parent.mkdir(parents=True, exist_ok=True)
            with open(log_of(cell.folder), "a", encoding="utf-8") as output:
                environment = {**os.environ, **place}
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
                self.processes.add(process)
                code = process.wait()
                self.processes.discard(process)
        finally:
            self.places.put(place)
        if code in INTERRUPTED:
            self.over = True
            raise KeyboardInterrupt
        return cell.results() if code == 0 else None, code, time.monotonic() - began


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let other signals end the runs as Ctrl-C does; a sweep that just died would leave them running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    like_ctrl_c = signal.default_int_handler
    ending = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under `nohup`
        ending.remove(signal.SIGHUP)
    before = {number: signal.signal(number, like_ctrl_c) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def visible_devices() -> list[str]:
    """List the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return (named if any(named) else [str(index) for index in range(count)])[:count]


def log_of(folder: Path) -> Path:
    """Name the file that the process of a cell writes its output to."""
    return folder.with_name(f"{folder.name}.log")


def _outcome(cell: Cell, results: Results | None, code: int) -> str:
    if results is None:
        last_line = log_of(cell.folder).read_text("utf-8", errors="replace").rstrip().rpartition("\n")[2]
        return f"failed with code {code}, see {log_of(cell.folder)}: {last_line.strip()}"
    last, bwt = (score_text(results.metrics.get(key)) for key in ("last", "bwt"))
    return f"Last {last}, BWT {bwt}"
