"""Run sequences in processes of their own that can be killed at a chosen call, and look at what they leave.

A fork server imports the heavy libraries once, so a child starts in milliseconds; it never has used a thread of torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

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
    "mllm_keeplora.data.mini",
]
MEASURED = ("predictions/*.jsonl", "*.safetensors", "adapter/*", "gradient.json", "manifest.json")


def run_in_child(values: dict[str, Any], kill: tuple[str, int] | None = None, **options: Any) -> int:
    """Run a whole sequence in a child; returns its exit code, negative for the signal that ended it.

    Args:
        values: a run's config.
        kill: (what, n): SIGKILL at the n-th call. `what` is `module:attribute.path`, killed before the call; with a
            `+` in front after it; `rename:NAME` is the moment before a finished temporary file becomes NAME.
        options: for `run_sequence`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_child, args=(values, kill, options))
    child.start()
    child.join(240)
    if child.is_alive():
        child.kill()
        raise AssertionError("the child did not end")
    return child.exitcode


def _child(values: dict[str, Any], kill: tuple[str, int] | None, options: dict[str, Any]) -> None:
    from mllm_keeplora.config import parse_config
    from mllm_keeplora.eval import page
    from mllm_keeplora.sequence import run_sequence

    page.render_html = lambda *args, **keywords: "left out"  # drawing takes longer than the whole run
    if kill is not None:
        _arm(*kill)
    run_sequence(parse_config(values, origin="test"), **options)


def _arm(what: str, number: int) -> None:
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
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **keywords)
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
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
