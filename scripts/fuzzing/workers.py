"""Cases run in a forked child, one after another: its memory is limited; it is replaced when it hangs or dies."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

from fuzzing.mutations import mutated
from fuzzing.samples import Target
from fuzzing.targets import targets

KINDS = ("ok", "refused", "traceback", "hang", "memory")
BAD = KINDS[2:]
SECONDS = 10  # a case may take
GRACE = 5  # seconds more before a child that does not answer is killed
MEMORY = 2 << 30  # bytes that a case may take beyond what the child began with
LONGEST = 4000  # characters of a sentence
Judged = tuple[int, str, str, str]  # case, reader, kind, what was told


class TookTooLong(BaseException):
    """Nothing that is read may catch this."""


def prepared(folder: Path, only: str = "") -> list[Target]:
    """Lay out valid inputs, and see that all of them are read."""
    found = [target for target in targets(folder) if target.name.startswith(only)]
    for target in found:
        if not target.name.startswith(("picture other", "csv", "tsv", "plugins")):
            target.read(target.path)
    return found


def spoil(inputs: list[Target], seed: int, case: int) -> Target:
    """Put one spoilt input in its place: the readers take turns."""
    rng = random.Random(f"{seed}/{case}")
    target = inputs[case % len(inputs)]
    for each in inputs:
        if not each.path.is_file() or each.path.read_bytes() != each.valid:
            each.path.write_bytes(each.valid)
    target.path.write_bytes(mutated(rng, target.kind, target.valid))
    return target


def judged_cases(inputs: list[Target], seed: int, count: int) -> Iterator[Judged]:
    """Run all cases and say what each came to; a child that hangs or dies is told of and replaced."""
    begun, context = 0, multiprocessing.get_context("fork")
    while begun < count:
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(inputs, seed, begun, count, theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            while begun < count:
                if not ours.poll(SECONDS + GRACE):
                    child.kill()
                    yield begun, inputs[begun % len(inputs)].name, "hang", "does not come back to Python"
                    begun += 1
                    break
                yield ours.recv()
                begun += 1
        except EOFError:
            child.join()
            code = child.exitcode
            kind = "memory" if code == -signal.SIGKILL else "traceback"
            yield begun, inputs[begun % len(inputs)].name, kind, f"the process ended with {code}"
            begun += 1
        child.join(SECONDS)
        ours.close()


def _child(inputs: list[Target], seed: int, begun: int, count: int, pipe) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    for case in range(begun, count):
        pipe.send(_judged(inputs, seed, case))
    pipe.close()


def _too_long(*_) -> None:
    raise TookTooLong


def _judged(inputs: list[Target], seed: int, case: int) -> Judged:
    from mllm_keeplora.__main__ import PLACES
    from mllm_keeplora.errors import UserError

    target = spoil(inputs, seed, case)
    kind, told = "ok", ""
    signal.alarm(SECONDS)
    try:
        target.read(target.path)
    except UserError as error:
        kind, told = "refused", str(error)
        if not told.strip() or max(map(len, error.sentences)) > LONGEST:
            kind, told = "traceback", f"no sentence: {len(told)} characters, {told[:80]!r}"
    except OSError as error:
        is_place = error.filename and error.errno in PLACES
        kind, told = ("refused", "") if is_place else ("traceback", _place(error))
    except MemoryError as error:
        kind, told = "memory", _place(error)
    except TookTooLong as error:
        kind, told = "hang", _place(error)
    except BaseException as error:
        kind, told = "traceback", _place(error)
    finally:
        signal.alarm(0)
    return case, target.name, kind, told


def _place(error: BaseException) -> str:
    """Say where an error came from, so that the same fault is told once."""
    steps = traceback.extract_tb(error.__traceback__)
    ours = [step for step in steps if "mllm_keeplora" in step.filename and "/scripts/" not in step.filename]
    step = (ours or steps)[-1]
    return f"{type(error).__name__} in {Path(step.filename).name}:{step.lineno} {step.name}"
