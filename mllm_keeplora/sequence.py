"""The main job, read from top to bottom: teach a base model one domain after another, and show what it still knows.

    prepare                 what to keep of the untouched base (Strategy.prepare)
    evaluate                what the base answers
    for each domain:
      gradient              where to learn: the start of the domain's branch (before_domain)
      train                 the branch, under Trainer and DeepSpeed (batch, extra_loss, around_step)
      consolidate           grow what is kept (after_domain); merge from pristine base and all factors
      diagnose              room left, leak, interference, overlap
      evaluate              one row of the score matrix
    report                  metrics, table, HTML

Each stage is done once: killed at any moment, the same call continues at the first stage that is not done. Told to stop
by a signal, the run first writes a checkpoint of what it trains (`watch`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mllm_keeplora.checks.run import Checked, check_everywhere
from mllm_keeplora.config import RunConfig
from mllm_keeplora.data import with_published_epochs
from mllm_keeplora.eval.results import Results
from mllm_keeplora.runs import BASE_UNIT, RunDir
from mllm_keeplora.stages.consolidate import consolidate
from mllm_keeplora.stages.diagnose import diagnose
from mllm_keeplora.stages.evaluate import evaluate
from mllm_keeplora.stages.gradient import gradient
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.stages.opening import open_run
from mllm_keeplora.stages.prepare import prepare
from mllm_keeplora.stages.report import report
from mllm_keeplora.stages.train import train
from mllm_keeplora.stages.trouble import trouble_told
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.log import log, start_logging
from mllm_keeplora.training.deepspeed import deepspeed_file


def run_sequence(
    config: RunConfig, from_run: str | Path | None = None, after: int | None = None, redo: str | None = None
) -> Results:
    """Run a whole sequence, or continue it; give its results, which are also in the run directory.

    Args:
        config: from `load_config`.
        from_run, after: start from another run's state after its first `after` domains.
        redo: a stage of the run that is there, to go back to: it and what rests on it are done again.

    Raises:
        UserError: a fault of config, data, base, or of the run directory; nothing was started or changed.
        Diverged: a training came to numbers that are not finite.
        Unwritable: the run directory cannot be written.
        Stopped: a signal ended the run; it is a SystemExit with code 75, or 130 after Ctrl-C.
    """
    start_logging()
    _limit_threads(config)
    deepspeed_file(config.deepspeed)  # refused here if it is not installed: the process group needs it
    group = distributed.process_group(config.distributed_timeout_s, config.deepspeed is not None)
    with group, watch.watched(), files.written(config.output_dir):
        checked = check_everywhere(config)
        for note in checked.notes:
            log.warning("%s", note)
        with RunDir(config.output_dir).locked():
            parent = Path(from_run) if from_run is not None else None
            run = distributed.main_first(lambda: open_run(config, checked, parent, after, redo))
            start_logging(run.log_file)
            # The ledger has compared what was asked; published epochs are filled in for the stages alone.
            asked = with_published_epochs(config, checked.benchmark)
            with trouble_told(asked, checked):
                return _run_stages(asked, run, checked)


def _run_stages(config: RunConfig, run: RunDir, checked: Checked) -> Results:
    learner = Learner(config, run, checked.benchmark, checked.strategy)
    run.once("prepare", partial(prepare, learner))
    evaluate(learner, BASE_UNIT)  # does each set once by itself
    for unit in run.units:
        if not run.is_done(f"{unit.key}/consolidate"):
            log.info("[%d/%d] %s", unit.index, len(run.units), ", ".join(unit.domains))
        run.once(f"{unit.key}/gradient", partial(gradient, learner, unit))
        run.once(f"{unit.key}/train", partial(train, learner, unit))
        run.once(f"{unit.key}/consolidate", partial(consolidate, learner, unit))
        run.forget(run.folder(unit).checkpoints)
        if config.diagnostics.samples:
            run.once(f"{unit.key}/diagnose", partial(diagnose, learner, unit))
        evaluate(learner, unit)
    return report(learner)


def _limit_threads(config: RunConfig) -> None:
    if config.threads is not None:
        import scipy.linalg  # noqa: F401  (its BLAS must be loaded to be limited)
        import torch
        from threadpoolctl import threadpool_limits

        threadpool_limits(config.threads)
        torch.set_num_threads(config.threads)
