"""The command that runs a sweep, whole or in parts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def sweep(
    config: Annotated[str, typer.Argument(metavar="SWEEP", help="a sweep's YAML file, or a shipped name")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, e.g. tune.seed=1")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="runs side by side; each gets its share of the cores. Default: one for each GPU, else 1"
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="for schedulers: tune:K/N, run K of the N to choose from; further:K/N, one beyond the grid of "
            "strategy K; tune, all of them and the choice; final:K/N, run K of the N final ones, after the choice",
        ),
    ] = None,
    slurm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="run nothing; write a script that submits the sweep to SLURM")
    ] = None,
) -> None:
    """Choose every strategy's setting by one rule on the validation questions, run the choice over seeds, compare.

    With several GPUs as many runs at a time, each on one of them. The same command continues an interrupted sweep.

    On SLURM: --slurm FILE writes a script, `bash FILE [SBATCH OPTION]...` submits it: arrays of runs, one after the
    other, and at last the comparison.

    Example: mllm-keeplora sweep mini_dcl --jobs 2

    Example: mllm-keeplora sweep mini_dcl --slurm sweep.sh; bash sweep.sh --gpus 1 --time 4:00:00
    """
    from mllm_keeplora.errors import UserError
    from mllm_keeplora.sweeps.cells import ending_as_a_run
    from mllm_keeplora.system.distributed import world_size
    from mllm_keeplora.system.log import start_logging

    if world_size() > 1:
        raise UserError("sweep starts its runs by itself; call it without torchrun (each gets a share of the cores)")
    start_logging()
    with ending_as_a_run():
        _sweep(config, overrides or [], jobs, only, slurm)


def _sweep(config: str, overrides: list[str], jobs: int | None, only: str | None, slurm: Path | None) -> None:
    from rich.console import Console

    from mllm_keeplora.errors import UserError
    from mllm_keeplora.report.render.tables import compare_table
    from mllm_keeplora.sweeps.jobs import run_part, slurm_script
    from mllm_keeplora.sweeps.plan import load_sweep
    from mllm_keeplora.sweeps.sweep import check_sweep, run_sweep
    from mllm_keeplora.system import files

    loaded = load_sweep(config, overrides)
    if slurm is not None:
        if only is not None or jobs is not None:
            raise UserError("--slurm goes with neither --only nor --jobs: every job of the script runs what it is for")
        check_sweep(loaded)  # faults are told here and not by a hundred jobs; data that are drawn are drawn once
        command = [sys.executable, "-m", "mllm_keeplora", "sweep", config, *overrides]
        files.write_text(slurm, slurm_script(loaded, command, Path.cwd()))
        submit = f"bash {shlex.quote(str(slurm))} --gpus 1 --time 8:00:00  (options of sbatch)"
        typer.echo(f"written  {slurm}\nsubmit   {submit}")
        return
    if only is not None:
        typer.echo("\n".join(run_part(loaded, only, jobs)))
        return
    results = run_sweep(loaded, jobs)
    Console().print(compare_table(results))
    typer.echo(f"\nreport   {loaded.folder}/report.html\ntables   {loaded.folder}/tables.md")
