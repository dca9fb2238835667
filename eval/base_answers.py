"""What the untouched base answers, asked once by runs that share a folder: no strategy, rate or seed has a part in it.

    <shared>/<set>-<digest>/     predictions and figures as in a run, facts.json; there whole or not at all

Answers are shared, not scores: whoever takes them over grades them. The digest is of all that a run is compared by when
it is continued, as far as the base's answers depend on it, and of where it runs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import Benchmark
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.grading import answer_files, regrade
from mllm_keeplora.eval.harness import forget_journals
from mllm_keeplora.eval.rows import asked_records
from mllm_keeplora.identity import Identity, digest_of, environment
from mllm_keeplora.runs import BASE_UNIT, RunDir
from mllm_keeplora.system import distributed, files, owners
from mllm_keeplora.system.log import log

Facts = dict[str, Any]

RULES = 2  # how pictures are shown and answers made; others made otherwise are asked anew


def asked_once(
    shared: Path, run: RunDir, config: RunConfig, benchmark: Benchmark, name: str, ask: Callable[[], Facts]
) -> Facts:
    """Take over what the same base answered another run, or ask and leave the answers for others.

    Args:
        shared: the folder that the runs share; they may use it at the same time.
        run, config, benchmark: of the run that asks.
        name: of the domain or suite.
        ask: answers and grades the set with the run's base; returns facts for the ledger.

    Returns:
        The facts; `seconds` is what the asking took, whoever asked, so that costs of runs can be compared.
    """
    kept = shared / f"{name}-{_digest(run, config, name)}"
    predictions = run.folder(BASE_UNIT).predictions(name)

    def take_over() -> Facts | None:
        if not distributed.is_main() or not kept.is_dir():
            return None
        try:
            facts = files.read_json(kept / "facts.json", files.OBJECT)
            for path in answer_files(kept / predictions.name):
                files.write_atomically(predictions.with_name(path.name), partial(shutil.copyfile, path))
            facts["score"] = regrade(predictions, benchmark.graded(name), asked_records(benchmark, name, config))
        except (UserError, ValueError, OSError) as error:
            log.warning("the base is asked %s again: %s", name, error)
            return None
        return facts

    # One decision for all processes, since another run may end just now.
    facts = distributed.from_main(distributed.main_first(take_over))
    if facts is not None:
        log.info("the base's answers to %s are those in %s", name, kept)
        forget_journals(run.folder(BASE_UNIT), [name])
        return facts
    started = time.monotonic()
    facts = ask()
    facts["seconds"] = round(time.monotonic() - started, 3)
    if distributed.is_main():
        _publish(kept, predictions, facts)
    return facts


def _publish(kept: Path, predictions: Path, facts: Facts) -> None:
    """Leave answers for others; the first to do so does. Who cannot has its own, and says so."""
    staged = owners.staged(kept, "tmp")
    try:
        staged.mkdir(parents=True)
        for path in answer_files(predictions):
            shutil.copyfile(path, staged / path.name)
        files.write_json(staged / "facts.json", facts)
        if not kept.exists():
            files.put_in_place(staged, kept)
    except OSError as error:
        if not kept.is_dir():  # else another run was faster by a moment
            log.warning("the base's answers are not kept for other runs: %s", error)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _digest(run: RunDir, config: RunConfig, name: str) -> str:
    import torch

    identity = Identity.of_ledger(run.ledger)
    pictures = sorted(run.ledger.sets[name].get("pictures", {}).items())
    what = [identity.base, identity.digest(name), pictures, identity.generator, RULES]
    how = {key: value for key, value in run.ledger.config.items() if key.startswith(("base.", "eval."))}
    batches = [config.eval.batch_size, config.eval.weights, config.deepspeed, distributed.world_size()]
    on_gpu = distributed.device() != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else [torch.backends.cpu.get_cpu_capability(), config.threads]
    return digest_of([what, dict(sorted(how.items())), batches, device, dict(sorted(environment().items()))])
