"""`python -m mllm_keeplora` and the `mllm-keeplora` command: exit codes and nothing else."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm_keeplora.errors import UserError

# What a path that somebody gave can run into.
PLACES = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def main() -> None:
    """Run the command line, and exit as `errors` lists: 0 when done, 2 on a user's mistake, 1 on a fault of ours."""
    _pass_over_working_folder()
    if "RANK" in os.environ:  # the deepspeed launcher tells the local rank as an option, too
        sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost store is a page of C++ calls, too
    code = _run()
    if "RANK" in os.environ:
        # Interpreter shutdown after a distributed run can abort although all work is done (seen with ZeRO-3 and gloo).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _pass_over_working_folder() -> None:
    """Import nothing that lies by chance where one works, as `python -m` would: in somebody's data set or run."""
    here, checkout = os.getcwd(), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.path[:1] == [here] and here != checkout:
        del sys.path[0]


def _run() -> int:
    from mllm_keeplora.errors import INTERRUPTED

    try:
        from mllm_keeplora.cli import app
        from mllm_keeplora.system.watch import Stopped, tell_failure, tell_mistake

        app(standalone_mode=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code == INTERRUPTED and not isinstance(stop, Stopped):  # the watch has said so
            _say_interrupted()
    except KeyboardInterrupt:
        code = INTERRUPTED
        _say_interrupted()
    except Exception as error:
        mistake = _mistake_of(error)
        # A fault of ours: show where, and let no launcher take it for a user's mistake.
        code = tell_mistake(mistake) if mistake is not None else tell_failure(error)
    else:
        code = 0
    return code


def _mistake_of(error: Exception) -> UserError | None:
    """What the user can mend, of whatever library an error is; None for a fault of ours."""
    from mllm_keeplora.errors import UserError, first_line, is_out_of_memory
    from mllm_keeplora.system.files import unwritable

    if isinstance(error, UserError):
        return error
    if refused := unwritable(error):
        return refused
    if is_out_of_memory(error):
        return UserError(f"there is not enough memory: {first_line(error)}")
    if isinstance(error, OSError) and error.errno in PLACES and error.filename:
        return UserError(f"{error.filename}: {error.strerror}")
    return None


def _say_interrupted() -> None:
    if os.environ.get("RANK", "0") == "0":
        print("stopped", file=sys.stderr)


if __name__ == "__main__":
    main()
