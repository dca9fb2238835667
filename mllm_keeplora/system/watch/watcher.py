"""The two threads of a watched process: one asks the others, one waits for signals and ends the process if it has to.

Twice a second a process's heartbeat goes into the store. One that stands still, or a store that is gone, is the sign of
a process that is dead or of a machine that has vanished.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import distributed
from mllm_keeplora.system.watch.signals import ENDING, Signals, Stopped
from mllm_keeplora.system.watch.store import SharedStore

POLL_S = 0.5
SILENCE_S = 40  # a process may hold the interpreter's lock, or be paused, for so long and not be taken for dead
ECHO_S = 8  # the same, once a connection between processes has broken
CAUSE_S = 15  # how long a broken connection waits for news of what broke it
GRACE_S = 10  # from a signal to the end, where no checkpoint is to be written
LEFT_S = 3  # from the end of one process to that of another which may be waiting for it
AGAIN_S = 3  # earlier, a second signal is the same one: launchers pass on what a scheduler has sent to all
MISTAKE_S = 5  # how long the main process may take to find the mistake that another one has found


class Failure(NamedTuple):
    """A failure ended a run: the process that failed, a sentence that names it, and the exit code of all."""

    rank: int
    sentence: str
    code: int


class Watcher:
    """Run the two watching threads, and keep what they have heard.

    Args:
        store: for word from the other processes; None where there are none.
    """

    def __init__(self, store: SharedStore | None):
        self.store = store
        self.stage = ""
        self.told: int | None = None  # the signal that ends the run
        self.keeping = False  # a checkpoint is to be written before this process ends
        self._told_at = 0.0
        self._own_signal_at: float | None = None
        self._told_again = False
        self._state: dict[str, Any] = {"heartbeat": 0}  # of this process, for the others
        self._found: Failure | None = None  # for the others, if it is the first
        self._first: Failure | None = None  # the first failure of the run
        self._left: dict[int, float] = {}  # ranks that are about to end, and since when
        self._patience = SILENCE_S
        self._silence = 0.0  # seconds for which the store has not answered
        self._closed = False
        self._ending = threading.Lock()  # the thread that takes it ends this process, and says why
        self._news = threading.Event()
        self._polling = threading.Thread(target=self._poll, name="poll", daemon=True)

    def start(self) -> None:
        self._signals = Signals(lambda: self.keeping)
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        if self.store is not None:
            self._polling.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def close(self) -> None:
        """End in good order; signals do again what they did before."""
        self._ending.acquire(blocking=False)  # from now on the watching thread does not end this process
        self._closed = True
        self._signals.release()
        self._news.set()
        if self.store is not None:
            self._polling.join(1)

    # -- the main thread -----------------------------------------------------------------------------------------

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        self.keeping = True
        try:
            yield
        finally:
            self._told_at, self.keeping = time.monotonic(), False

    def leave(self, number: int) -> None:
        """Say that this process ends since a signal came, and wait until all others do."""
        self._ending.acquire()
        self.tell(number)
        self._say_stopped(number)  # first: a launcher may end this process as soon as another one has ended
        self._part(GRACE_S + LEFT_S)

    def fail(self, error: Exception) -> int:
        """Tell the others of an error, and the user if it is the first; returns the exit code."""
        if self.store is not None and _may_be_an_echo(error):
            self._patience = ECHO_S
            _until(lambda: self._first is not None, CAUSE_S)
        what = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        own = Failure(distributed.rank(), f"{self._who()} failed{self._where()}: {what}", 1)
        first = self._settle(own)
        if first == own:
            if distributed.world_size() > 1:
                print(own.sentence, file=sys.stderr)
            traceback.print_exception(error)
        else:
            self._say(first)
        self._part()
        return first.code

    def refuse(self, error: UserError) -> int:
        """Tell of a mistake that the user can mend, in the main process alone if all find it; returns the exit code."""
        who = ""
        if not distributed.is_main():
            who = f"{self._who()}: "
            # The main process may find the same; outside of a watch, a launcher then ends this process.
            _until(lambda: self._first is not None, MISTAKE_S)
        first = self._settle(Failure(distributed.rank(), f"error: {who}{error}", error.code))
        self._say(first)
        self._part()
        return first.code

    # -- any thread ----------------------------------------------------------------------------------------------

    def tell(self, number: int) -> None:
        """Let the run end, here and in all other processes."""
        if self.told is None:
            self._told_at, self.told = time.monotonic(), number
            self._post(told=number)

    def _post(self, **news: Any) -> None:
        self._state |= news
        self._news.set()

    def _settle(self, failure: Failure) -> Failure:
        """Offer a failure as the run's, return the run's first one; the calling thread is now to end this process."""
        if self.store is None:
            return failure
        self._ending.acquire()
        self._found = failure
        self._news.set()
        _until(lambda: self._first is not None, LEFT_S)
        return self._first or failure

    def _part(self, seconds: float = LEFT_S) -> None:
        """Wait until all are about to end: with the first one may go the store, or all others by a launcher's hand."""
        self._post(left=True)
        _until(lambda: not self._polling.is_alive() or len(self._left) == distributed.world_size(), seconds)

    # -- the polling thread --------------------------------------------------------------------------------------

    def _poll(self) -> None:
        before: list[dict[str, Any]] = [{} for _ in self.store.hosts]
        still = [0.0 for _ in before]
        while not self._closed:
            self._state["heartbeat"] += 1
            try:
                *states, first = self.store.exchange(self._state.copy(), self._found)
            except RuntimeError:  # torch's, whatever has become of the connection
                return
            self._silence = 0.0
            for rank, state in enumerate(states):
                if "told" in state:
                    self.tell(state["told"])
                if "left" in state:
                    self._left.setdefault(rank, time.monotonic())
                # Counted in polls, not by the clock: this process may have been paused itself.
                still[rank] = still[rank] + POLL_S if state == before[rank] else 0.0
                if still[rank] > self._patience and rank not in self._left:
                    self._found = self._found or self._dead(rank)
            if first is not None:
                self._first = self._first or Failure(*first)
            before = states
            self._news.wait(POLL_S)
            self._news.clear()

    # -- the watching thread -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._signals.received.settimeout(POLL_S)
        while not self._closed:
            try:
                for number in self._signals.received.recv(64):
                    self._on_signal(number)
            except TimeoutError:
                self._silence += POLL_S
            # The main process, or its launcher, hosts the store; from a paused one a call does not return.
            lost = self._silence > self._patience or not self._polling.is_alive()
            if self.store is not None and lost and 0 not in self._left:
                self._first = self._first or self._dead(0)
            self._end_if_due()

    def _on_signal(self, number: int) -> None:
        if number not in ENDING:
            return
        if number == signal.SIGHUP:  # to write to a terminal that is gone is an error
            for terminal in self._terminals:
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), terminal)
        # What a person presses twice is meant twice, unless a launcher passes on the first.
        soonest = 0 if number == signal.SIGINT and "RANK" not in os.environ else AGAIN_S
        if self._own_signal_at is None:
            self._own_signal_at = time.monotonic()
            self.tell(number)
            if number == signal.SIGINT and self.keeping and distributed.is_main():
                print("\nstopping after this optimizer step; Ctrl-C again ends at once", file=sys.stderr)
        elif time.monotonic() - self._own_signal_at > soonest:
            self._told_again = True

    def _end_if_due(self) -> None:
        """End this process, whatever its main thread waits for, unless that is about to do so."""
        now = time.monotonic()
        others_left = any(now - since > LEFT_S for since in list(self._left.values()))
        overdue = self._told_again or others_left or (now - self._told_at > GRACE_S and not self.keeping)
        stopped = self.told is not None and overdue
        if not (self._first or stopped) or not self._ending.acquire(blocking=False):
            return
        if self._first is not None:
            self._say(self._first)
            code = self._first.code
        else:
            self._say_stopped(self.told)
            code = Stopped(self.told).code
        self._part()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    # -- words ---------------------------------------------------------------------------------------------------

    def _who(self) -> str:
        return _name_of(distributed.rank(), socket.gethostname())

    def _where(self) -> str:
        return f" in stage {self.stage}" if self.stage else ""

    def _dead(self, rank: int) -> Failure:
        who = _name_of(rank, self.store.hosts[rank])
        why = "it was killed, or its machine or launcher is gone"
        return Failure(rank, f"{who} ended without a word{self._where()}: {why}", 1)

    def _say(self, failure: Failure) -> None:
        """Print a failure in the main process, or, where that has failed, in one process on each other machine."""
        own = distributed.rank()
        if self.store is None:  # nobody knows what the main process has found
            speaks = own == 0 or os.environ.get("LOCAL_RANK") == "0"
        elif failure.rank == 0 and failure.code == 1:
            hosts = self.store.hosts
            here = (rank for rank, host in enumerate(hosts) if rank > 0 and host == hosts[own])
            speaks = own == min(here, default=None)
        else:
            speaks = own == 0
        if speaks:
            end = " (all other processes end too; the same command continues)" if failure.code == 1 else ""
            print(f"{failure.sentence}{end}", file=sys.stderr)

    def _say_stopped(self, number: int) -> None:
        if distributed.is_main():
            why = "" if number == signal.SIGINT else f" on {signal.Signals(number).name}"
            print(f"stopped{why}; the same command continues the run", file=sys.stderr)


def _name_of(rank: int, host: str) -> str:
    return f"rank {rank} of {distributed.world_size()} on {host}"


def _may_be_an_echo(error: Exception) -> bool:
    """Whether an error is of a connection, and so perhaps but the echo of another process's end."""
    words = ("gloo", "NCCL", "nccl", "Connection closed", "Connection reset", "Broken pipe", "Socket")
    return isinstance(error, OSError | RuntimeError) and any(word in str(error) for word in words)


def _until(happened: Callable[[], bool], seconds: float) -> None:
    """Wait for something, but not for ever."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.02)
