"""Stage `train`: fit the open branch and leave its factors."""

from __future__ import annotations

import shutil
from typing import Any

from mllm_keeplora.adapters.mixers import save_mixer
from mllm_keeplora.config import result_defining
from mllm_keeplora.identity import training_identity
from mllm_keeplora.models.base import compute_dtype
from mllm_keeplora.runs import Unit
from mllm_keeplora.stages.learner import Learner, add_facts
from mllm_keeplora.stages.units import training_records
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.log import log
from mllm_keeplora.training.deepspeed import deepspeed_file
from mllm_keeplora.training.seeds import seed_everything, stage_seed
from mllm_keeplora.training.state import write_training_state


def train(learner: Learner, unit: Unit) -> dict[str, Any]:
    """Train the open branch; leave its factors in peft's format."""
    from mllm_keeplora.training.arguments import training_arguments
    from mllm_keeplora.training.fit import fit_domain

    folder = learner.folder(unit)
    if learner.open_unit != unit:
        learner.start(unit)
        learner.reopen(unit, trained=False)
    seed = stage_seed(learner.config.seed, unit.key, "train")
    settings = learner.config.train_of(unit.domains[0]) if len(unit.domains) == 1 else learner.config.train
    records, epochs = training_records(unit, learner.benchmark, learner.config)
    bf16 = compute_dtype(learner.config.base.dtype).itemsize == 2
    engine = deepspeed_file(learner.config.deepspeed)
    arguments = training_arguments(settings, epochs, folder.checkpoints, seed, engine, bf16)
    seed_everything(seed)
    context = learner.context(unit, "train", records)
    identity = training_identity(
        learner.run.record,
        unit.key,
        epochs,
        result_defining(settings),
        [learner.config.deepspeed, distributed.world_size()] if engine else None,
    )
    _log_plan(learner, unit, len(records), epochs, arguments)
    metrics = learner.run.path / "metrics.jsonl"
    with watch.until_saved(), distributed.keeping_step(learner.config.distributed_timeout_s):
        facts = fit_domain(learner.strategy, context, settings, epochs, arguments, metrics, identity)
        factors, full = learner.adapters.read(), learner.adapters.read_full()
        if distributed.is_main():
            factors.save(folder.adapter, learner.config.adapters.dropout)
            if full:
                files.write_tensors(folder.projector, full)
            if learner.adapters.mixer is not None:
                save_mixer(folder.trained_mixer, learner.adapters.mixer)
            write_training_state(learner.strategy, folder.training_state)
            add_facts(folder, context.facts)
    if engine and bf16:  # it rounded all parameters, those of the past too: the next stage reads the files
        distributed.barrier()
        learner.leave()
    return facts


def discard_checkpoints(learner: Learner, unit: Unit) -> None:
    """Free their disk, once the ledger says that nothing needs them."""
    if distributed.is_main():
        shutil.rmtree(learner.folder(unit).checkpoints, ignore_errors=True)


def _log_plan(learner: Learner, unit: Unit, num_records: int, epochs: float, arguments: Any) -> None:
    trained = learner.adapters.trainable()
    world, micro, steps = (
        distributed.world_size(),
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
    )
    log.info(
        "%s: %d records x %g epochs, batch %d = %d processes x %d x %d accumulated, %s trained parameters",
        unit.name, num_records, epochs, world * micro * steps, world, micro, steps,
        f"{sum(parameter.numel() for parameter in trained.values()):,}",
    )  # fmt: skip
