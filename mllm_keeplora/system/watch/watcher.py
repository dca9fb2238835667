"""The thread that waits for signals and for what other processes say, and ends its own process where it has to.

It costs nothing while there is neither. The main process has the last word on which failure was the first.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import distributed
from mllm_keeplora.system.watch.peers import Peers
from mllm_keeplora.system.watch.signals import ENDING, Signals, Stopped

GRACE_S = 10  # from a signal to the end, where no checkpoint is to be written
LEFT_S = 3  # from the end of one process to that of another which may be waiting for it
AGAIN_S = 3  # earlier, a second signal is the same one: launchers pass on what a scheduler has sent to all
CAUSE_S = 5  # how long a broken connection waits for news of what broke it
MISTAKE_S = 5  # how long the main process may take to find the mistake that another one has found


@dataclass(frozen=True)
class Failure:
    """What ended a run: the process that failed, a sentence that names it, and the exit code of all."""

    rank: int
    sentence: str
    code: int


class Watcher:
    """The watching thread, and what it has heard.

    Args:
        peers: the other processes; None where there are none.
    """

    def __init__(self, peers: Peers | None):
        self.peers = peers
        self.stage = ""
        self.told: int | None = None  # the signal that ends the run
        self.keeping = False  # a checkpoint is to be written before this process ends
        self._told_at = 0.0
        self._own_signal_at: float | None = None
        self._leaving = False  # the main thread ends this process, and says why
        self._left: dict[int, float] = {}  # ranks that have ended in good order, and when
        self._first: Failure | None = None  # the first failure of the run
        self._mistake: tuple[Failure, float] | None = None  # found by another process, not yet by the main one
        self._closed = False
        self._lock = threading.Lock()
        self._signals = Signals()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)

    def start(self) -> None:
        self._signals.catch()
        self._thread.start()

    def close(self) -> None:
        """End in good order; signals do again what they did before."""
        self._send({"left": True})
        self._closed = True
        self._signals.release()
        self._signals.wake()
        self._thread.join(1)
        if self.peers is not None:
            self.peers.close()

    def forget(self) -> None:
        """In a forked process: take part no more. The parent's thread is not here."""
        self._signals.release()
        if self.peers is not None:
            self.peers.close()

    # -- the main thread -----------------------------------------------------------------------------------------

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        self.keeping = True
        try:
            yield
        finally:
            self._told_at, self.keeping = time.monotonic(), False

    def tell(self, number: int) -> None:
        """Let the run end, here and in all other processes."""
        with self._lock:
            if self.told is not None:
                return
            self._told_at, self.told = time.monotonic(), number
        self._send({"told": number})

    def leave(self, number: int) -> None:
        """Say that this process ends since a signal came, and wait until all others do."""
        self._leaving = True
        self.tell(number)
        self._say_stopped(number)  # first: a launcher may end this process as soon as another one has ended
        self._send({"left": True})
        others = distributed.world_size() - 1
        _until(lambda: len(self._left) == others or self._first is not None, GRACE_S + LEFT_S)

    def fail(self, error: Exception) -> int:
        """Tell the others of an error, and the user if it is the first; returns the exit code."""
        if _may_be_an_echo(error):  # the thread ends this process as soon as it hears of the failure behind it
            _until(lambda: self._first is not None, CAUSE_S)
        self._leaving = True
        own = Failure(distributed.rank(), f"{self._who()} failed {self._where()}: {short(error)}", 1)
        self._report(own)
        if self._first in (None, own):
            print(own.sentence, file=sys.stderr)
            traceback.print_exception(error)
        else:
            self._say(self._first)
        return 1

    def refuse(self, error: UserError) -> int:
        """Tell of a mistake that the user can mend, in the main process alone if all find it; returns the exit code."""
        self._leaving = True
        if distributed.is_main():
            print(f"error: {error}", file=sys.stderr)
        self._report(Failure(distributed.rank(), f"{self._who()}: {error}", 2))
        _until(lambda: self._first is not None, MISTAKE_S)
        return 2

    def _report(self, failure: Failure) -> None:
        """Let the main process know, which tells the others."""
        if distributed.is_main():
            self._settle(failure)
        else:
            self._send({"failed": asdict(failure)})
            _until(lambda: self._first is not None, CAUSE_S)

    # -- the watching thread -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        connections = self.peers.connections if self.peers is not None else {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals.received, selectors.EVENT_READ)
            for rank, connection in connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while not self._closed:
                waiting = self.told is not None or self._mistake is not None
                for key, _ in selector.select(0.25 if waiting else None):
                    if key.data is None:
                        for number in self._signals.received.recv(64):
                            self._on_signal(number)
                    elif self._hear(key.data):
                        selector.unregister(key.fileobj)
                self._end_if_overdue()

    def _on_signal(self, number: int) -> None:
        if number not in ENDING and (number != signal.SIGINT or self.peers is None):
            return  # Python's own handler is enough for Ctrl-C in a single process
        if self._own_signal_at is None:
            self._own_signal_at = time.monotonic()
            self.tell(number)
        elif time.monotonic() - self._own_signal_at > AGAIN_S:
            self._stop_now()

    def _hear(self, rank: int) -> bool:
        """Take in what a process has said; returns whether it is gone."""
        messages, gone = self.peers.receive(rank)
        for message in messages:
            if "told" in message:
                self.tell(message["told"])
            elif "left" in message:
                self._left[message.get("rank", rank)] = time.monotonic()
                if distributed.is_main():
                    self.peers.send({"left": True, "rank": rank}, but=rank)
            else:
                self._on_failure(Failure(**message["failed"]))
        if gone and not self._closed and rank not in self._left and self._first is None:
            what = f"{name_of(rank, self.peers.hosts[rank])} ended without a word {self._where()}"
            self._on_failure(Failure(rank, f"{what}: it was killed, or its machine is gone", 1))
        return gone

    def _on_failure(self, failure: Failure) -> None:
        if failure.code == 2 and distributed.is_main() and not self._leaving:
            self._mistake = self._mistake or (failure, time.monotonic())  # give the main thread time to find it
            return
        self._settle(failure)
        if not self._leaving:
            self._say(self._first)
            _exit(self._first.code)

    def _settle(self, failure: Failure) -> None:
        """Take a failure for the run's if it is the first; what the main process takes, the others hear."""
        with self._lock:
            self._first = self._first or failure
        if distributed.is_main():
            self._send({"failed": asdict(self._first)})

    def _end_if_overdue(self) -> None:
        now = time.monotonic()
        if self._leaving or self._closed:
            return
        if self._mistake is not None and now - self._mistake[1] > MISTAKE_S:
            print(f"error: {self._mistake[0].sentence}", file=sys.stderr)
            self._settle(self._mistake[0])
            _exit(2)
        if self.told is not None:
            others_left = any(now - since > LEFT_S for since in self._left.values())
            if others_left or (now - self._told_at > GRACE_S and not self.keeping):
                self._stop_now()

    def _stop_now(self) -> None:
        self._say_stopped(self.told)
        self._send({"left": True})
        _exit(Stopped(self.told).code)

    # -- words ---------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any]) -> None:
        if self.peers is not None:
            self.peers.send(message)

    def _who(self) -> str:
        return name_of(distributed.rank(), socket.gethostname())

    def _where(self) -> str:
        return f"in stage {self.stage}" if self.stage else "before the first stage"

    def _say(self, failure: Failure) -> None:
        """One sentence on another process's failure, by the main process, or by one on each machine without it."""
        hosts, own = self.peers.hosts, distributed.rank()
        here = (rank for rank, host in enumerate(hosts) if host == hosts[own] and rank != 0)
        if failure.code == 1 and own == (min(here) if failure.rank == 0 else 0):
            print(f"{failure.sentence} (all other processes end too; the same command continues)", file=sys.stderr)

    def _say_stopped(self, number: int) -> None:
        if distributed.is_main() and number != signal.SIGINT:  # Ctrl-C has a sentence already
            print(f"stopped on {signal.Signals(number).name}; the same command continues the run", file=sys.stderr)


def name_of(rank: int, host: str) -> str:
    return f"rank {rank} of {distributed.world_size()} on {host}"


def short(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _may_be_an_echo(error: Exception) -> bool:
    """Whether an error is of a connection, and so perhaps but the echo of another process's end."""
    words = ("gloo", "NCCL", "nccl", "Connection closed", "Connection reset", "Broken pipe", "Socket")
    return isinstance(error, OSError | RuntimeError) and any(word in str(error) for word in words)


def _until(happened: Callable[[], bool], seconds: float) -> None:
    """Wait for something, but not for ever."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.02)


def _exit(code: int) -> None:
    """End this process, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
