"""Stage `train`: fit the open branch and leave its factors."""

from __future__ import annotations

import math
from typing import Any

from mllm_keeplora.adapters.mixers import save_mixer
from mllm_keeplora.models.base import compute_dtype
from mllm_keeplora.runs import Unit
from mllm_keeplora.stages.learner import Learner, add_facts
from mllm_keeplora.stages.units import training_records
from mllm_keeplora.system import distributed, files, watch
from mllm_keeplora.system.log import log
from mllm_keeplora.training.deepspeed import deepspeed_file
from mllm_keeplora.training.state import write_training_state


def train(learner: Learner, unit: Unit) -> dict[str, Any]:
    """Train the open branch; leave its factors in peft's format."""
    from mllm_keeplora.training.nonfinite import RolledBack

    while True:
        try:
            return _train(learner, unit)
        except RolledBack:  # the files are where the training goes on, as after an interruption
            learner.invalidate()


def _train(learner: Learner, unit: Unit) -> dict[str, Any]:
    from mllm_keeplora.training.arguments import training_arguments
    from mllm_keeplora.training.fit import fit_domain

    config, run = learner.config, learner.run
    folder = run.folder(unit)
    if learner.open_unit != unit:
        learner.start(unit)
        learner.reopen(unit, trained=False)
    settings = config.train_of(unit.domains[0]) if len(unit.domains) == 1 else config.train
    records, epochs = training_records(unit, learner.benchmark, config)
    context = learner.context(unit, "train", records)
    bf16 = compute_dtype(config.base.dtype).itemsize == 2
    engine, world = deepspeed_file(config.deepspeed), distributed.world_size()
    files.make_folder(folder.checkpoints)  # one that the Trainer makes would not outlive a power cut
    arguments = training_arguments(settings, epochs, folder.checkpoints, context.seed, engine, bf16)
    identity = {  # facts that a checkpoint must share with a training that goes on from it
        "config": run.ledger.config,
        "unit": unit.key,
        "epochs": epochs,
        "train": settings.result_defining(),
        "engine": [config.deepspeed, world] if engine else None,  # others do not read its states
    }
    micro, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    trained = sum(parameter.numel() for parameter in learner.adapters.trainable().values())
    batch = f"batch {world * micro * steps} = {world} processes x {micro} x {steps} accumulated"
    told = f"{batch}, {trained:,} trained parameters"
    planned = math.ceil(len(records) / settings.batch_size * epochs)
    cut = (
        f", train.args.max_steps makes it {arguments.max_steps} steps, not {planned}" if arguments.max_steps > 0 else ""
    )
    log.info("%s: %d records x %g epochs%s, %s", unit.name, len(records), epochs, cut, told)
    metrics = run.path / "metrics.jsonl"
    with watch.until_saved(), distributed.keeping_step(config.distributed_timeout_s):
        facts = fit_domain(learner.strategy, context, settings, epochs, arguments, metrics, identity)
        factors, full = learner.adapters.read(), learner.adapters.read_full()
        if distributed.is_main():
            factors.save(folder.adapter, config.adapters.dropout)
            if full:
                files.write_tensors(folder.projector, full)
            if (prototypes := learner.adapters.prototypes()) is not None:
                prototypes.save(folder.prototypes)
            if learner.adapters.mixer is not None:
                save_mixer(folder.trained_mixer, learner.adapters.mixer)
            write_training_state(learner.strategy, folder.training_state)
            events = facts.get("nonfinite")
            add_facts(folder, context.facts | ({"nonfinite": events} if events else {}))
    if engine and bf16:  # it rounded all parameters, those of the past too: the next stage reads the files
        distributed.barrier()
        learner.invalidate()
    return facts
