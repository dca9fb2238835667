"""Ends a run in good order: when a signal says so, and when one of its processes has failed.

SIGTERM, SIGUSR1, a closed terminal (SIGHUP) and Ctrl-C end all processes where nothing is lost: a training at the end
of an optimizer step, after a checkpoint; every other stage at the next `stop_here`, or wherever it is ten seconds later
(after Ctrl-C at once), since files are whole at any moment and such a stage is repeated. A second signal does not wait
for the checkpoint. The exit code is 75, after Ctrl-C 130. A failure ends the other processes; one sentence names it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import distributed
from mllm_keeplora.system.watch.signals import Stopped
from mllm_keeplora.system.watch.signals import ignore_endings as ignore_endings  # for those who call `watch`
from mllm_keeplora.system.watch.store import SharedStore
from mllm_keeplora.system.watch.watcher import Watcher

_watcher = Watcher(None)  # signals belong to the whole process, and so does who answers them


@contextmanager
def watched() -> Iterator[None]:
    """Watch over a run for the time of the block, within an open process group.

    After an exception in one of several processes the watch stays, until `tell_failure` or `tell_mistake` has told the
    others of it, or until this process ends.

    Raises:
        Stopped: from `stop_here` inside of the block; it is a SystemExit.
    """
    global _watcher
    watcher = _watcher = Watcher(SharedStore() if distributed.world_size() > 1 else None)
    watcher.start()
    over = True
    try:
        yield
        distributed.barrier()
    except (Stopped, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        watcher.leave(number)
        raise Stopped(number) from None
    except BaseException:
        over = watcher.store is None
        raise
    finally:
        if over:
            watcher.close()
            _watcher = Watcher(None)


def enter(stage: str) -> None:
    """Say what is done next, for messages; a run that is to end does so here."""
    _watcher.stage = stage
    stop_here()


def stage() -> str:
    """Name what is done now, as `enter` was told."""
    return _watcher.stage


def stop_here() -> None:
    """End the run here if a signal has said so, but not inside of `until_saved`.

    Raises:
        Stopped: it has.
    """
    if _watcher.told is not None and not _watcher.keeping:
        stop_saved()


def until_saved() -> AbstractContextManager[None]:
    """Let a block not end half-way: it asks `stop_agreed`, writes a checkpoint, and calls `stop_saved`."""
    return _watcher.until_saved()


def stop_agreed() -> bool:
    """Tell whether the run is to end; all processes have to ask at the same time, and hear the same."""
    number = distributed.largest(_watcher.told or 0)
    if number:
        _watcher.tell(number)
    return number > 0


def stop_saved() -> NoReturn:
    """End the run, as was agreed."""
    raise Stopped(_watcher.told)


def tell_failure(error: Exception) -> int:
    """Say what went wrong in this process, with its traceback, and end the others; returns the exit code."""
    return _watcher.fail(error)


def tell_mistake(error: UserError) -> int:
    """Say what the user can mend: once, however many processes have found it; returns the exit code."""
    return _watcher.refuse(error)
