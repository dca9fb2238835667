"""Run sequences in processes of their own that something happens to at a chosen call, and look at what they leave.

A fork server imports the heavy libraries once, so a child starts in milliseconds; it never has used a thread of torch.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from tests.integration.commands import Said
from tests.support.undrawn import leave_drawing_out

PRELOADED = [
    "torch",
    "transformers",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.processing_llava",
    "transformers.models.clip.image_processing_clip",
    "peft",
    "accelerate",
    "deepspeed",
    "yaml",
    "rich.logging",
    "matplotlib.figure",
    "mllm_keeplora.sequence",
    "mllm_keeplora.training.fit",
    "mllm_keeplora.eval.saved",
    "mllm_keeplora.mini",
    "mllm_keeplora.report.compared",
]
MEASURED = ("predictions/*.jsonl", "*.safetensors", "adapter/*", "gradient.json", "manifest.json")


def killed() -> None:
    """As by the kernel, when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def paused() -> None:
    """As if the machine had vanished: connections stay open, and nothing answers. Ends after a minute."""
    subprocess.Popen(["sh", "-c", f"sleep 60; kill -KILL {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupted() -> None:
    """As by Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def told(number: int) -> None:
    """A signal from outside, which this process has noticed."""
    from mllm_keeplora.system import watch

    os.kill(os.getpid(), number)
    until = time.monotonic() + 20
    while watch._watcher.told is None and time.monotonic() < until:
        time.sleep(0.01)


def run_in_child(
    values: dict[str, Any], kill: tuple[str, int] | None = None, act: Callable[[], None] = killed, **options: Any
) -> int:
    """Run a whole sequence in a child; returns its exit code, negative for the signal that ended it.

    Args:
        values: a run's config.
        kill: (what, n): SIGKILL at the n-th call. `what` is `module:attribute.path`, killed before the call; with a
            `+` in front after it; `rename:NAME` is the moment before a finished temporary file becomes NAME.
        act: what happens then, if not SIGKILL.
        options: for `run_sequence`.
    """
    return _ended(_start(_child, values, kill, act, options))


def command_in_child(*words: object, kill: tuple[str, int] | None = None, act: Callable[[], None] = killed) -> Said:
    """Run `mllm-keeplora` in a child with this process's environment; `kill` and `act` as in `run_in_child`."""
    with tempfile.TemporaryDirectory() as folder:
        armed = (*kill, act) if kill is not None else None
        code = _ended(_start(_command, list(map(str, words)), dict(os.environ), f"{folder}/said", armed))
        return Said(code, *(Path(f"{folder}/said.{name}").read_text() for name in ("out", "err")))


def _ended(child: Any) -> int:
    child.join(900)  # a backstop: a busy machine is no fault
    if child.is_alive():
        child.kill()
        raise AssertionError("the child did not end")
    return child.exitcode


def _start(target: Callable, *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=target, args=arguments)
    child.start()
    return child


def _child(
    values: dict[str, Any], kill: tuple[str, int] | None, act: Callable[[], None], options: dict[str, Any]
) -> None:
    gc.freeze()  # see tests/conftest.py
    from mllm_keeplora.config import parse_config
    from mllm_keeplora.sequence import run_sequence

    leave_drawing_out()
    if kill is not None:
        _arm(*kill, act)
    run_sequence(parse_config(values, origin="test"), **options)


@dataclass
class Ended:
    """How one of several processes ended: its exit code, what it said, and how long after the others' first."""

    code: int
    err: str
    after: float


def run_on_two(
    values: dict[str, Any], folder: Path, acts: Mapping[int, tuple[str, int, Callable[[], None]]] | None = None
) -> list[Ended]:
    """`mllm-keeplora run` on two processes (gloo) that no launcher looks after.

    Args:
        values: a run's config.
        folder: for what the processes say.
        acts: rank -> (what, n, act), as in `run_in_child`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    port = free_port()
    children = [_start(_rank, rank, port, str(folder), (acts or {}).get(rank)) for rank in (0, 1)]
    ends: dict[int, float] = {}
    until = time.monotonic() + 900
    while len(ends) < 2 and time.monotonic() < until:
        ends |= {rank: time.monotonic() for rank in (0, 1) if rank not in ends and not children[rank].is_alive()}
        time.sleep(0.02)
    for child in children:
        child.kill()
    said = [(folder / f"{rank}.err").read_text() for rank in (0, 1)]
    assert len(ends) == 2, f"ranks {set(range(2)) - set(ends)} did not end: {said}"
    first = min(ends.values())
    return [Ended(children[rank].exitcode, said[rank], ends[rank] - first) for rank in (0, 1)]


def launched(code: str, folder: Path, *arguments: Path) -> None:
    """Run `code` on two processes (gloo) under torch's launcher; they end as the command does, without a shutdown."""
    script = folder / "child.py"
    script.write_text(f"import os\n{code}\nos._exit(0)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = [*launch, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Act = tuple[str, int, Callable[[], None]]  # what, n and act, as in `run_in_child`


def _rank(rank: int, port: int, folder: str, act: Act | None) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = {name: str(value) for name, value in environment.items()}
    _command(["run", f"{folder}/run.yaml"], words, f"{folder}/{rank}", act)


def _command(words: list[str], environment: dict[str, str], told: str, act: Act | None) -> None:
    """The command in this forked process; what it says goes into the files `told`.out and .err."""
    gc.freeze()
    os.environ |= {**environment, "COLUMNS": "200"}
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{told}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    from mllm_keeplora.__main__ import main

    leave_drawing_out()
    if act is not None:
        _arm(*act)
    sys.argv = ["mllm-keeplora", *words]
    main()


def _arm(what: str, number: int, act: Callable[[], None]) -> None:
    if what.startswith("rename:"):
        owner, name, after = os, "replace", False
        wanted = what.removeprefix("rename:")
    else:
        module, path = what.lstrip("+").split(":")
        *parents, name = path.split(".")
        owner, after, wanted = import_module(module), what.startswith("+"), None
        for parent in parents:
            owner = getattr(owner, parent)
    original, calls = getattr(owner, name), [0]

    def counted(*args, **keywords):
        calls[0] += wanted is None or str(args[1]).endswith(wanted)
        if calls[0] == number and not after:
            act()
        result = original(*args, **keywords)
        if calls[0] == number and after:
            act()
        return result

    setattr(owner, name, counted)


def artefacts(run: Path) -> dict[str, bytes]:
    """Everything learnt and answered, byte for byte, by its path within the run."""
    folders = [run / "prepare", *sorted((run / "domains").iterdir())]
    found = {path for folder in folders for pattern in MEASURED for path in folder.glob(pattern)}
    assert found, f"{run} holds nothing to compare"
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(found)}


def differing(first: Path, second: Path) -> list[str]:
    """Paths of artefacts that are not the same in two runs."""
    one, two = artefacts(first), artefacts(second)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def stages(run: Path) -> list[str]:
    """Names of the stages that the ledger has as done, in order."""
    return list(json.loads((run / "run.json").read_text())["stages"])


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def leftovers(run: Path) -> list[str]:
    """Files that only an unfinished run may hold."""
    unfinished = [path for pattern in ("*.tmp", "*.part", "checkpoint*") for path in run.rglob(pattern)]
    return sorted(str(path.relative_to(run)) for path in unfinished)
