"""The command line: parse, call, print. Every command says what it does with an example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_keeplora.cli.evaluation import ask, evaluate, rescore
from mllm_keeplora.cli.sweep import sweep

if TYPE_CHECKING:
    from mllm_keeplora.config import RunConfig

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
    redo: Annotated[
        str | None, typer.Option(metavar="STAGE", help="go back to a stage, e.g. 02_Med/train, and on from there")
    ] = None,
) -> None:
    """Run a whole sequence; the same command continues an interrupted run.

    Example: mllm-keeplora run mini_dcl strategy.name=finetune output=runs/finetune
    """
    from mllm_keeplora.config import load_config
    from mllm_keeplora.errors import UserError

    # A mistake in the config is told before anything heavy is imported.
    if (from_run is None) != (after is None):
        raise UserError("--from RUN and --after N belong together")
    loaded = load_config(config, overrides or [])

    from mllm_keeplora.report.render.tables import results_table
    from mllm_keeplora.sequence import run_sequence
    from mllm_keeplora.system.distributed import is_main

    results = run_sequence(loaded, from_run=from_run, after=after, redo=redo)
    if is_main():
        _show(results_table(results.to_dict()))
        typer.echo(f"\nresults  {loaded.output_dir}/results.json\nreport   {loaded.output_dir}/report.html")


app.command(name="eval")(evaluate)
app.command()(rescore)
app.command()(ask)


@app.command()
def report(
    run: Run,
    export: Annotated[
        Path | None, typer.Option(help="also write the tables as CSV, Markdown and LaTeX into this folder")
    ] = None,
) -> None:
    """Print a run's table again and rewrite its report.html from what is stored.

    Example: mllm-keeplora report runs/mini_dcl --export tables
    """
    from mllm_keeplora.errors import Unwritable
    from mllm_keeplora.eval.results import collect_results
    from mllm_keeplora.eval.saved import load_run
    from mllm_keeplora.report.page import refresh_results
    from mllm_keeplora.report.render.export import exported, run_tables
    from mllm_keeplora.report.render.tables import results_table
    from mllm_keeplora.system import files

    saved, refused = load_run(run), None
    try:
        results = refresh_results(saved).to_dict()
    except Unwritable as error:  # as in an archive, whose tables can be shown nevertheless
        results, refused = collect_results(saved.run, saved.benchmark, saved.config).to_dict(), error
    _show(results_table(results))
    if refused is None:
        typer.echo(f"\nreport   {run}/report.html")
    for name, text in exported(run_tables(results)).items() if export is not None else ():
        files.write_text(export / name, text)
        typer.echo(f"table    {export / name}")
    if refused is not None:
        raise refused


@app.command()
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that does not exist yet")],
    to: Annotated[str, typer.Option(help="merged: a whole model for transformers; adapter: one for peft")] = "merged",
    after: Annotated[int | None, typer.Option(help="after so many domains; default: all that are learnt")] = None,
    domain: Annotated[str | None, typer.Option(help="of a run with a branch for each domain: whose")] = None,
    without_prototypes: Annotated[
        bool, typer.Option("--without-prototypes", help="leave out a CLIP's prototypes, for which others have no place")
    ] = False,
) -> None:
    """Write what a run has learnt as a checkpoint that plain transformers or peft loads.

    Example: mllm-keeplora export runs/mini_dcl --after 3 --to merged checkpoints/after_3
    """
    from mllm_keeplora.exports.checkpoint import export as export_run

    export_run(run, to, folder, after, domain, without_prototypes)
    typer.echo(f"written  {folder}")


@app.command()
def inspect(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="compare every file with what the run has written")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="make a damaged run.json again, then verify")] = False,
) -> None:
    """Show what a run did to its model: room left, gradient split, leak, interference, overlap.

    Example: mllm-keeplora inspect runs/mini_dcl
    """
    from mllm_keeplora.errors import UserError
    from mllm_keeplora.report.page import unit_facts
    from mllm_keeplora.report.render.diagnostics import inspection
    from mllm_keeplora.runs import RunDir

    if verify or rebuild:
        _verify(run, rebuild)
        return
    units = unit_facts(RunDir(run).load())
    if not units:
        raise UserError(f"{run} has finished no domain yet: there is nothing to inspect")
    _show(inspection(units))


def _verify(folder: Path, rebuild: bool) -> None:
    """Compare a run's files with their digests; exit code 1 where one is lost or changed."""
    from mllm_keeplora.runs import RunDir
    from mllm_keeplora.system.log import start_logging

    start_logging()
    run = RunDir(folder)
    if rebuild:
        with run.locked():
            run.rebuild()
    else:
        run.load()
    if run.ledger.artefacts is None:
        typer.echo(f"{folder} is of an older version and has no digests; they are taken when it is next written to")
        return
    faults = run.faults()
    for name, fault in faults:
        typer.echo(f"{fault}; {run.remedy(name)}")
    if faults or not run.is_proven:
        raise typer.Exit(1)
    typer.echo(f"{len(run.ledger.artefacts)} files are what the run has written")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run folders, results.json files, sweep folders")
    ],
    output: Annotated[Path | None, typer.Option(help="also write report.html, tables and pictures here")] = None,
) -> None:
    """Show finished runs side by side; runs that differ by seed alone become one row, mean and standard deviation.

    Example: mllm-keeplora compare runs/mini_dcl runs/mini_dcl_finetune --output runs/comparison
    """
    from mllm_keeplora.report.compared import load_results, write_comparison
    from mllm_keeplora.report.render.tables import compare_table

    results = load_results(runs)
    _show(compare_table(results))
    if output is not None:
        write_comparison(output, output.name, results)
        typer.echo(f"report   {output}/report.html")


app.command()(sweep)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    show: Annotated[
        str | None, typer.Option(metavar="[DOMAIN/]N", help="print training record N (from 0) as the model will see it")
    ] = None,
) -> None:
    """Look for every fault of config, data and base before anything runs.

    Example: mllm-keeplora check my_run.yaml --show RS/12
    """
    from mllm_keeplora.checks.run import check_run, memory_of
    from mllm_keeplora.config import load_config
    from mllm_keeplora.report.render.tables import memory_table
    from mllm_keeplora.system.log import start_logging

    start_logging()
    loaded = load_config(config, overrides or [])
    if show is not None:
        _show_record(loaded, show)
        return
    checked = check_run(loaded)
    for name, counts in checked.counts.items():
        having = checked.pictures.get(name, {})
        told = (f"{count} {kind} records ({having.get(kind, 0)} with pictures)" for kind, count in counts.items())
        typer.echo(f"{name:<12} {', '.join(told)}")
    typer.echo(f"base         {checked.base_location}")
    for line in checked.parts:
        typer.echo(f"  {line}")
    memory = memory_of(loaded, checked)
    if memory is not None:
        _show(memory_table(memory.stages, memory.host, memory.where))
    for note in checked.notes:
        typer.echo(f"note         {note}")
    if checked.unseen:
        typer.echo(f"no faults found, but not looked at: {'; '.join(checked.unseen)}")
    else:
        typer.echo("no faults found")


def _show_record(config: RunConfig, which: str) -> None:
    """Print one training record, by domain and number, as the model will see it."""
    from mllm_keeplora.checks.records import as_seen, load_family
    from mllm_keeplora.data import load_benchmark
    from mllm_keeplora.errors import UserError, known
    from mllm_keeplora.models.shipped import resolve

    benchmark = load_benchmark(config)
    domain, _, number = which.rpartition("/")
    domain = domain or next(iter(benchmark.domains))
    if domain not in benchmark.domains or not number.isdigit():
        raise UserError(f"--show must be DOMAIN/N or N, got {which!r}; domains: {known(benchmark.domains)}")
    records = benchmark.train_records(domain)
    if int(number) >= len(records):
        raise UserError(f"--show {which}: {domain} has {len(records)} training records, numbered from 0")
    family = load_family(config.base, resolve(config.base))
    if family is None:
        raise UserError(f"--show needs the processor of {config.base.model}, which is not on this machine")
    _show(as_seen(family, records[int(number)]))


@app.command(name="list")
def list_names(
    kind: Annotated[str, typer.Argument(help="strategies, models, benchmarks, runs or sweeps")],
    plugins: Annotated[str | None, typer.Option(help="comma-separated modules of your own, as in a config")] = None,
) -> None:
    """List what can be named in a config.

    Example: mllm-keeplora list strategies
    """
    from mllm_keeplora.config import shipped
    from mllm_keeplora.errors import UserError
    from mllm_keeplora.system.plugins import load_plugins

    load_plugins([name.strip() for name in (plugins or "").split(",") if name.strip()], origin="--plugins")
    if kind == "strategies":
        from mllm_keeplora.strategies import STRATEGIES, summary_of

        for name in STRATEGIES:
            typer.echo(f"{name:<12} {summary_of(name)}")
    elif kind in {"models", "benchmarks", "runs", "sweeps"}:
        for name in shipped(kind):
            typer.echo(name)
    else:
        raise UserError(f"list knows strategies, models, benchmarks, runs and sweeps, got {kind!r}")


def _show(renderable: Any) -> None:
    """Print a table or a picture of rich's."""
    from rich.console import Console

    Console().print(renderable)
