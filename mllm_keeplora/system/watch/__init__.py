"""Ends a run in good order: when a signal says so, and when one of its processes has failed.

SIGTERM and SIGUSR1 end all processes with code 75 where nothing is lost: a training at the end of an optimizer step,
after a checkpoint; every other stage at the next `stop_here`, or wherever it is ten seconds later, since files are
whole at any moment and such a stage is repeated. A failure ends the other processes at once; one sentence names it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import distributed
from mllm_keeplora.system.watch.signals import Stopped, ignore_endings, once_for_forks
from mllm_keeplora.system.watch.store import SharedStore
from mllm_keeplora.system.watch.watcher import MISTAKE_S, Watcher, name_of, short

__all__ = [
    "Stopped",
    "enter",
    "ignore_endings",
    "stop_agreed",
    "stop_here",
    "stop_saved",
    "tell_failure",
    "tell_mistake",
    "until_saved",
    "watched",
]

_watcher: Watcher | None = None  # signals belong to the whole process, and so does who answers them


@contextmanager
def watched() -> Iterator[None]:
    """Watch over a run for the time of the block, within an open process group.

    After an exception in one of several processes the watch stays, until `tell_failure` or `tell_mistake` has told the
    others of it, or until this process ends.

    Raises:
        Stopped: from `stop_here` inside of the block; it is a SystemExit.
    """
    several = distributed.world_size() > 1
    watcher = _begin(Watcher(SharedStore() if several else None))
    try:
        yield
        distributed.barrier()
    except (Stopped, KeyboardInterrupt) as stop:
        watcher.leave(stop.number if isinstance(stop, Stopped) else signal.SIGINT)
        _end(watcher)
        raise
    except BaseException:
        if not several:
            _end(watcher)
        raise
    else:
        _end(watcher)


def enter(stage: str) -> None:
    """Say what is done next, for messages; a run that is to end does so here."""
    if _watcher is not None:
        _watcher.stage = stage
    stop_here()


def stop_here() -> None:
    """End the run here if a signal has said so, but not inside of `until_saved`.

    Raises:
        Stopped: it has.
    """
    if _watcher is not None and _watcher.told is not None and not _watcher.keeping:
        raise Stopped(_watcher.told)


@contextmanager
def until_saved() -> Iterator[None]:
    """For a block that is not to end half-way: it asks `stop_agreed`, writes a checkpoint, and calls `stop_saved`."""
    if _watcher is None:
        yield
        return
    with _watcher.until_saved():
        yield


def stop_agreed() -> bool:
    """Whether the run is to end, the same in all processes, which have to ask at the same time."""
    if _watcher is None:
        return False
    number = distributed.largest(_watcher.told or 0)
    if number:
        _watcher.tell(number)
    return number > 0


def stop_saved() -> NoReturn:
    """End the run, as was agreed."""
    raise Stopped(_watcher.told)


def tell_failure(error: Exception) -> int:
    """Say what went wrong in this process, with its traceback, and end the others; returns the exit code."""
    if _watcher is not None and _watcher.store is not None:
        return _watcher.fail(error)
    if distributed.world_size() > 1:
        print(f"{name_of(distributed.rank(), socket.gethostname())} failed: {short(error)}", file=sys.stderr)
    traceback.print_exception(error)
    return 1


def tell_mistake(error: UserError) -> int:
    """Say what the user can mend: once, however many processes have found it; returns the exit code."""
    if _watcher is not None and _watcher.store is not None:
        return _watcher.refuse(error)
    if distributed.is_main():
        print(f"error: {error}", file=sys.stderr)
        return 2
    time.sleep(MISTAKE_S)  # a launcher ends this process meanwhile if the main one has found the same
    if os.environ.get("LOCAL_RANK") == "0":
        print(f"error: {name_of(distributed.rank(), socket.gethostname())}: {error}", file=sys.stderr)
    return 2


def _begin(watcher: Watcher) -> Watcher:
    global _watcher
    once_for_forks(_forget_in_child)
    _watcher = watcher
    watcher.start()
    return watcher


def _end(watcher: Watcher) -> None:
    global _watcher
    _watcher = None
    watcher.close()


def _forget_in_child() -> None:
    """A forked process, such as a data loader's worker, is not the run: it answers no signal."""
    global _watcher
    watcher, _watcher = _watcher, None
    if watcher is not None:
        watcher.forget()
