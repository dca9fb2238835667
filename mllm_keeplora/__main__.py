"""`python -m mllm_keeplora` and the `mllm-keeplora` command: exit codes and nothing else."""

from __future__ import annotations

import errno
import os
import sys

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
    """Run the command line; exits 0 when done, 2 on a user's mistake, 75 and 130 when stopped, 1 on a fault of ours."""
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


def _run() -> int:
    from mllm_keeplora.cli import app
    from mllm_keeplora.errors import INTERRUPTED, UserError
    from mllm_keeplora.system.distributed import is_main
    from mllm_keeplora.system.watch import tell_failure, tell_mistake

    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except UserError as error:
        code = tell_mistake(error)
    except OSError as error:
        is_place = error.filename and error.errno in PLACES
        code = tell_mistake(UserError(f"{error.filename}: {error.strerror}")) if is_place else tell_failure(error)
    except Exception as error:  # a fault of ours: show where, and let no launcher take it for a user's mistake
        code = tell_failure(error)
    else:
        code = 0
    if code == INTERRUPTED and is_main():
        print("stopped; the same command continues the run", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
