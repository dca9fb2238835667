"""`torchrun` that ends with the exit code of its workers and passes signals on to them; it takes torchrun's arguments.

Torchrun itself ends with 1 whatever its workers ended with. A shell or a scheduler could not tell a user's mistake (2)
from a run that was stopped and goes on when it is started again (75). SIGUSR1 would end torchrun, not reach the
workers; SIGTERM reaches them, but they are killed 30 seconds later, too soon for a large checkpoint. After a SIGUSR1,
a Ctrl-C or the end of the terminal they have all the time they need. Knows of the package the exit codes only.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from mllm_keeplora.errors import INTERRUPTED, STOPPED


def main(arguments: Sequence[str]) -> int:
    """Launch and wait for the workers; returns the exit code of the worker that failed first on this node, else 0."""
    signal.signal(signal.SIGUSR1, _pass_on)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under `nohup`
            signal.signal(number, _pass_on)
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGQUIT")  # those that torchrun answers itself
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, parse_args, run

    launch = parse_args(arguments)
    # What workers inherit, unless it is set: their share of the cores; on a CPU, that DeepSpeed shall use it.
    share = torch.get_num_threads() // determine_local_world_size(launch.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        run(launch)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _as_shell_code(failure.exitcode)
    except SignalException as stop:  # torchrun's own handling: it has ended the workers
        return _as_shell_code(-stop.sigval)
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Send the signal to every worker; without workers there is nothing to save, and the launch ends."""
    import psutil

    workers = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            if "LOCAL_RANK" in child.environ():
                child.send_signal(number)
                workers.append(child)
    if not workers:
        raise SystemExit(INTERRUPTED if number == signal.SIGINT else STOPPED)


def _as_shell_code(code: int) -> int:
    """A worker's exit code as a shell has it; one that a signal to stop ended before it could answer was stopped."""
    if code in (-signal.SIGUSR1, -signal.SIGTERM, -signal.SIGHUP):
        return STOPPED
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
