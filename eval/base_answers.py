"""What the untouched base answers, asked once by runs that share a folder: no strategy, rate or seed has a part in it.

    <shared>/<set>-<digest>/<set>.jsonl and its figures, as in a run; facts.json is written last

The digest is of everything that the answers depend on: weights, questions, how they are asked, device and versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_keeplora import distributed, files
from mllm_keeplora.config import RunConfig
from mllm_keeplora.eval.grading import answer_files
from mllm_keeplora.eval.results import digest_of_data, environment
from mllm_keeplora.log import log
from mllm_keeplora.runs import BASE_UNIT, RunDir

Facts = dict[str, Any]


def asked_once(shared: Path, run: RunDir, config: RunConfig, name: str, ask: Callable[[], Facts]) -> Facts:
    """Take over what another run was answered by the same base, or ask and leave the answers for others.

    Args:
        shared: the folder that the runs share; runs may use it at the same time.
        run, config: the run that asks; its base is loaded.
        name: of the domain or suite.
        ask: answers and grades the set with the run's base, and returns facts for the ledger.

    Returns:
        The facts; `seconds` is what the asking took, whoever asked, so that costs of runs can be compared.
    """
    kept = shared / f"{name}-{_digest(run, config, name)}"
    found = distributed.main_first(lambda: _taken_over(kept, run, name) if distributed.is_main() else None)
    facts = distributed.from_main(found)  # what one process asks, all do: another run may be done at this moment
    if facts is not None:
        log.info("the base's answers to %s are those in %s", name, kept)
        return facts
    started = time.monotonic()
    facts = ask()
    facts["seconds"] = round(time.monotonic() - started, 3)
    if distributed.is_main():
        for path in answer_files(run.folder(BASE_UNIT).predictions(name)):
            _copy(path, kept / path.name)
        files.write_json(kept / "facts.json", facts)
    return facts


def _taken_over(kept: Path, run: RunDir, name: str) -> Facts | None:
    """Facts of kept answers, which are the run's own afterwards; None where there are none."""
    if not (kept / "facts.json").is_file():
        return None
    for path in answer_files(kept / f"{name}.jsonl"):
        _copy(path, run.folder(BASE_UNIT).predictions(name).with_name(path.name))
    return files.read_json(kept / "facts.json")


def _digest(run: RunDir, config: RunConfig, name: str) -> str:
    record = run.record
    (part,) = (each for each in [*record["domains"], *record["suites"]] if each["name"] == name)
    settings = {key: value for key, value in record["config"].items() if key.startswith(("base.", "eval."))}
    place = [config.eval.batch_size, distributed.world_size(), distributed.device().split(":")[0], environment()]
    told = [record["base"]["fingerprint"], settings, digest_of_data([part]), place]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _copy(source: Path, target: Path) -> None:
    files.write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))
