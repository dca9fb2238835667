"""One look for every long stage: a bar with count, elapsed time and time to go, on the main process only.

Whoever moves a bar can be stopped there (`watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from mllm_keeplora.system import distributed, watch


@cache
def console():
    """Give the terminal that log lines, bars and tables share, so that they do not overwrite each other."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield `advance(n=1, note="")`; the bar vanishes when the block ends. No bar where the output is a file."""
    if not (distributed.is_main() and console().is_terminal):
        yield lambda n=1, note="": watch.stop_here()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    before = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    after = ("left", TimeRemainingColumn(), "{task.fields[note]}")
    with Progress(*before, *after, console=console(), transient=True) as progress:
        bar = progress.add_task(title, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            progress.update(bar, advance=n, **({"note": note} if note else {}))
            watch.stop_here()

        yield advance
