"""Signals that end a run, as bytes in a socket: they arrive at once, whatever the main thread waits for."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from mllm_keeplora.errors import INTERRUPTED, STOPPED

ENDING = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """A signal ended the run before it was done; the same command continues it."""

    def __init__(self, number: int):
        super().__init__(INTERRUPTED if number == signal.SIGINT else STOPPED)
        self.number = number


class Signals:
    """Catches `ENDING`; every signal that Python handles, Ctrl-C too, is then a byte in `received`."""

    def __init__(self):
        self.received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        self._before: dict[int, Any] = {}
        self._descriptor_before = -1

    def catch(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread do it
            self._before = {number: signal.signal(number, lambda *_: None) for number in ENDING}
            self._descriptor_before = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)

    def release(self) -> None:
        """Let signals do again what they did before."""
        if self._before:
            signal.set_wakeup_fd(self._descriptor_before)
            for number, handler in self._before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def wake(self) -> None:
        """Send a byte that is no signal."""
        self._sent.send(b"\0")


def ignore_endings() -> None:
    """Let the signals that end a run pass this process by: it ends with the run, or when that has died."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@cache
def once_for_forks(forget: Callable[[], None]) -> None:
    """Have `forget` called in every process that is forked from now on."""
    os.register_at_fork(after_in_child=forget)
