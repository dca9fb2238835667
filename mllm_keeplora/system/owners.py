"""Whose a lock or a temporary folder is: a process, told as `12@host`, and whether it is gone."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import files

GONE_S = 15  # how long what a killed process has started may outlive it: data loaders look after it every five seconds


def this_process() -> str:
    """Name this process as the owner of something."""
    return f"{os.getpid()}@{socket.gethostname()}"


def is_gone(owner: str) -> bool:
    """Tell whether a process of this machine is there no more; of another machine's nobody here can know."""
    pid, _, host = owner.partition("@")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def spelled(owner: str) -> str:
    """Say in words who an owner is; an older version named no machine."""
    pid, _, host = owner.partition("@")
    return f"(pid {pid}) on {host}" if host else f"(pid {pid})"


def staged(folder: Path, ending: str) -> Path:
    """Name the folder in which this process makes `folder`; those that killed processes left for it are removed."""
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.*.{ending}"):
        owner = left.name.removeprefix(f"{folder.name}.").removesuffix(f".{ending}")
        if is_gone(owner if "@" in owner else f"{owner}@{socket.gethostname()}"):  # an older version named no machine
            shutil.rmtree(left, ignore_errors=True)
    return folder.with_name(f"{folder.name}.{this_process()}.{ending}")


def take_lock(path: Path, what: str) -> TextIO:
    """Take a lock file, which is held until it is closed, and enter this process in it.

    One that a dead process's last children still hold is waited for.

    Args:
        path: of the file; made where there is none.
        what: it locks, for the sentence.

    Raises:
        UserError: another process holds it, or its file system gives no locks.
    """
    until = time.monotonic() + GONE_S
    while True:
        files.make_folder(path.parent)
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (the caller closes it)
        try:
            is_ours = _try_lock(handle)
        except OSError as error:
            handle.close()
            told = f"no lock on its file system ({error}); choose another `output`"
            raise UserError(f"{what}: {told}") from None
        if is_ours and path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            handle.truncate(0)
            handle.write(this_process())
            handle.flush()
            return handle
        handle.seek(0)  # else its last holder has removed it
        owner = handle.read().strip() or "unknown"
        handle.close()
        if not is_ours and (not is_gone(owner) or time.monotonic() > until):
            raise UserError(f"{what} is in use by another process {spelled(owner)}")
        time.sleep(0.1)


def holder_of(path: Path) -> str | None:
    """Name who holds a lock file, "(pid 12) on host"; None where nobody does, or it is not known."""
    with suppress(OSError), open(path, encoding="utf-8") as handle:
        owner = handle.read().strip()
        if owner and not is_gone(owner) and not _try_lock(handle, shared=True):
            return spelled(owner)
    return None


def _try_lock(handle: TextIO, shared: bool = False) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
