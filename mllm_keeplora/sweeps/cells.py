"""Cells of a sweep: runs as processes of their own, several side by side, none of them run twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from mllm_keeplora.config import RunConfig, load_config, parse_config, read_yaml
from mllm_keeplora.errors import INTERRUPTED, STOPPED
from mllm_keeplora.eval.results import Results
from mllm_keeplora.report.render.view import score_text
from mllm_keeplora.runs import RunDir
from mllm_keeplora.system.log import log
from mllm_keeplora.system.watch.signals import ENDING, OF_TERMINALS, Stopped, is_ignored

# Exit codes of a run that a signal ended, before or after it could see to it: it is not at fault, and goes on later.
ENDED = {code: number for number in ENDING for code in (-number, 128 + number)}
ENDED |= {STOPPED: signal.SIGTERM, INTERRUPTED: signal.SIGINT}
MISTAKE, KILLED = 2, -signal.SIGKILL
POLL_S = 1.0


class Told(KeyboardInterrupt):
    """A signal to a sweep, or to one of its runs, ends the sweep; the same command continues it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


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
        self.over = False  # the sweep or a run was told to stop: no other is started
        self.starting = threading.Lock()
        self.places: SimpleQueue[dict[str, str]] = SimpleQueue()  # what the environment of a run adds
        for index in range(self.jobs):
            self.places.put({"CUDA_VISIBLE_DEVICES": devices[index % len(devices)]} if devices else {})

    def run(self, cells: Sequence[Cell], title: str) -> list[Results | None]:
        """Run the cells that are not finished; returns the results of all in order, None where a run failed.

        A failure is told when it happens, and the others go on: what one run met (a full GPU, a strategy's refusal, a
        file system that was away for a moment) need not be what the next one meets.

        Raises:
            Told: this process or a run was told to stop; all runs have stopped in good order, and may be continued.
        """
        done = {cell: results for cell in cells if (results := cell.results()) is not None}
        todo = [cell for cell in cells if cell not in done]
        if todo:
            log.info("%s: %d runs to do, %d done, %d side by side", title, len(todo), len(done), self.jobs)
        started, pool = time.monotonic(), ThreadPoolExecutor(self.jobs)
        with _signals_to(self._on_signal):
            try:
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
                self.over = True
                pool.shutdown(wait=False, cancel_futures=True)
                with self.starting:
                    ended = list(self.processes)
                self._stop()
                for process in ended:  # here, too: the pool does not wait for a worker that was just being started
                    process.wait()
                self.processes.difference_update(ended)
                raise
            finally:
                pool.shutdown()
        return [done[cell] for cell in cells]

    def _on_signal(self, number: int) -> None:
        """End the sweep at the first signal; those that follow go to its runs, which end without delay at a second."""
        if self.over:
            self._stop()
        else:
            self.over = True
            raise Told(number)

    def _stop(self) -> None:
        for process in list(self.processes):
            process.terminate()

    def _run_one(self, cell: Cell) -> tuple[Results | None, int, float]:
        """Run a cell on a free device, or wait for the process that does; returns results, exit code and seconds."""
        began, place, was_killed = time.monotonic(), self.places.get(), False
        try:
            while True:
                self._wait_for_others(cell)
                if (results := cell.results()) is not None:
                    return results, 0, time.monotonic() - began
                code = self._process_of(cell, place)
                if code in ENDED:
                    self.over = True
                    raise Told(ENDED[code])
                if code == KILLED and not was_killed:  # from outside; what it has done is not lost
                    was_killed = True
                    log.warning("%s was killed and is continued", cell.folder.name)
                elif not (code == MISTAKE and RunDir(cell.folder).user()):  # another process was faster by a moment
                    break
        finally:
            self.places.put(place)
        return cell.results() if code in (0, MISTAKE) else None, code, time.monotonic() - began

    def _wait_for_others(self, cell: Cell) -> None:
        """Wait while another process works on a cell, such as one that a killed sweep has left."""
        told = None
        while not self.over and (user := RunDir(cell.folder).user()) is not None:
            if user != told:
                log.info("%s: waiting for %s, which works on it", cell.folder.name, user)
            told = user
            time.sleep(POLL_S)

    def _process_of(self, cell: Cell, place: dict[str, str]) -> int:
        """Run a cell in a process of its own, what it says at the end of its log; returns its exit code."""
        own = [f"threads={self.threads}"] if self.jobs > 1 else []
        command = [sys.executable, "-m", "mllm_keeplora", "run", cell.run, *cell.overrides, *own]
        log_of(cell.folder).parent.mkdir(parents=True, exist_ok=True)
        with open(log_of(cell.folder), "a", encoding="utf-8") as output:
            with self.starting:
                if self.over:
                    raise Told(signal.SIGTERM)
                # In a group of its own: a terminal's signals end the sweep, which lets its runs end in good order.
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **place}, process_group=0
                )
                self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        return code


@contextmanager
def ending_as_a_run() -> Iterator[None]:
    """Let a signal to this process, or to a run of it, end the block as it ends a run.

    Raises:
        Stopped: it did; all runs have stopped.
    """

    def end(number: int) -> None:
        raise Told(number)

    try:
        with _signals_to(end):
            yield
    except Told as told:
        if told.number != signal.SIGINT:  # Ctrl-C has a sentence already
            name = signal.Signals(told.number).name
            print(f"stopped on {name}; the same command continues the sweep", file=sys.stderr)
        raise Stopped(told.number) from None


@contextmanager
def _signals_to(handle: Callable[[int], None]) -> Iterator[None]:
    """Handle the signals that end a run, Ctrl-C too, but where this one is to outlive its terminal."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread catch signals
        yield
        return
    caught = [each for each in ENDING if each not in OF_TERMINALS or not is_ignored(each)]
    before = {each: signal.signal(each, lambda number, _: handle(number)) for each in caught}
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
