"""The command line: parse, call, print. Every command says what it does with an example."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mllm-keeplora",
    help="Teach a LLaVA-style multimodal LLM one domain after another without forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="a run's YAML file, or a shipped name such as mini_dcl")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted keys, e.g. train.lr=1e-3")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    from_run: Annotated[Path | None, typer.Option("--from", help="start from the state of another run")] = None,
    after: Annotated[int | None, typer.Option(help="with --from: after so many of its domains")] = None,
) -> None:
    """Run a whole sequence; the same command continues an interrupted run.

    Example: mllm-keeplora run mini_dcl strategy.name=finetune output=runs/finetune
    """
    from mllm_keeplora.config import load_config
    from mllm_keeplora.distributed import is_main
    from mllm_keeplora.errors import UserError
    from mllm_keeplora.sequence import run_sequence

    if (from_run is None) != (after is None):
        raise UserError("--from RUN and --after N belong together")
    loaded = load_config(config, overrides or [])
    results = run_sequence(loaded, from_run=from_run, after=after)
    if is_main():
        _print_results(results.to_dict())
        typer.echo(f"\nresults  {loaded.output_dir}/results.json\nreport   {loaded.output_dir}/report.html")


@app.command(name="eval")
def evaluate(
    run: Run,
    after: Annotated[int | None, typer.Option(help="after so many domains; 0 is the base model; default: all")] = None,
    domains: Annotated[str | None, typer.Option(help="comma-separated domains or suites; default: all")] = None,
    suite: Annotated[str | None, typer.Option(help="a suite's name, or a JSON file of test records")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="questions per forward; default: as in the run")] = None,
) -> None:
    """Ask a saved run's model and grade it, without training.

    Example: mllm-keeplora eval runs/mini_dcl --after 3 --domains RS,Med
    """
    from mllm_keeplora.distributed import is_main, process_group
    from mllm_keeplora.eval.saved import evaluate, load_run, refresh_results
    from mllm_keeplora.log import start_logging

    start_logging()
    saved = load_run(run)
    names = [name.strip() for name in domains.split(",")] if domains is not None else None
    with process_group():
        scores = evaluate(saved, after, names, suite, batch_size)
        refresh_results(saved)
    if not is_main():
        return
    for name, percent in scores.items():
        typer.echo(f"{name:<12} {percent:6.2f}")


@app.command()
def report(run: Run) -> None:
    """Print a run's table again and rewrite its report.html from what is stored.

    Example: mllm-keeplora report runs/mini_dcl
    """
    from mllm_keeplora.eval.saved import load_run, refresh_results

    results = refresh_results(load_run(run))
    _print_results(results.to_dict())
    typer.echo(f"\nreport   {run}/report.html")


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Look for every fault of config, data and base before anything runs.

    Example: mllm-keeplora check my_run.yaml
    """
    from mllm_keeplora.check import check_run
    from mllm_keeplora.config import load_config
    from mllm_keeplora.log import start_logging

    start_logging()
    checked = check_run(load_config(config, overrides or []))
    for name, counts in checked.counts.items():
        typer.echo(f"{name:<12} " + ", ".join(f"{count} {kind} records" for kind, count in counts.items()))
    typer.echo(f"base         {checked.base_location}")
    typer.echo("no faults found")


@app.command(name="list")
def list_names(kind: Annotated[str, typer.Argument(help="strategies, models, benchmarks or runs")]) -> None:
    """List what can be named in a config.

    Example: mllm-keeplora list strategies
    """
    from mllm_keeplora.config import shipped
    from mllm_keeplora.errors import UserError

    if kind == "strategies":
        from mllm_keeplora.strategies import STRATEGIES

        for name, strategy in STRATEGIES.items():
            summary = sys.modules[strategy.__module__].__doc__ or ""
            typer.echo(f"{name:<12} {summary.splitlines()[0]}")
    elif kind in {"models", "benchmarks", "runs"}:
        for name in shipped(kind):
            typer.echo(name)
    else:
        raise UserError(f"list knows strategies, models, benchmarks and runs, got {kind!r}")


def _print_results(results: dict) -> None:
    from rich.console import Console

    from mllm_keeplora.report import results_table

    Console().print(results_table(results))
