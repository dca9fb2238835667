"""Whose a lock or a temporary folder is: a process, told as `12@host`, and whether it is gone."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import socket
from pathlib import Path


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
