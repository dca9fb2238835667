"""Signals that end a run, as bytes in a socket: they arrive at once, whatever the main thread waits for."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from mllm_keeplora.errors import INTERRUPTED, STOPPED

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)  # who ignores these from the start, as under `nohup`, goes on doing so


class Stopped(SystemExit):
    """A signal ended the run before it was done; the same command continues it."""

    def __init__(self, number: int):
        super().__init__(INTERRUPTED if number == signal.SIGINT else STOPPED)
        self.number = number


class Signals:
    """Catches `ENDING`, Ctrl-C and the end of a terminal among them; each is then a byte in `received`.

    A forked process, such as a data loader's worker, is not the run: there, signals do again what they did before.

    Args:
        keeping: tells whether a checkpoint is to be written first; otherwise Ctrl-C interrupts whatever is done.
    """

    def __init__(self, keeping: Callable[[], bool]):
        self.received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread catch signals
            for number in ENDING:
                if number not in OF_TERMINALS or not is_ignored(number):
                    self._before[number] = signal.signal(number, partial(_note, keeping))
            self._descriptor_before = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        """Let signals do again what they did before; whoever waits for `received` wakes."""
        if self._before:
            signal.set_wakeup_fd(self._descriptor_before)
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)
        self._sent.close()


def is_ignored(number: int) -> bool:
    """Tell whether this process was started to ignore a signal, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def _note(keeping: Callable[[], bool], number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and not keeping():
        raise KeyboardInterrupt


def ignore_endings() -> None:
    """Let the signals that end a run pass this process by: it ends with the run, or when that has died."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
