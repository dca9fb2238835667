"""Commands that ask and grade without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="TARGET", help="a run directory, a model, or a peft adapter's folder")]
After = Annotated[int | None, typer.Option(help="of a run: after so many domains; 0 is the base model")]
Base = Annotated[str | None, typer.Option(help="of an adapter: its base, where it names none")]


def evaluate(
    target: Target,
    after: After = None,
    domains: Annotated[str | None, typer.Option(help="comma-separated domains or suites; default: all")] = None,
    suite: Annotated[str | None, typer.Option(help="of a run: a suite's name, or a JSON file of test records")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="questions per forward; default: as in the run")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="one question at a time, as the published runners do")] = False,
    benchmark: Annotated[
        str | None, typer.Option(help="of a model: a shipped benchmark, a YAML, or a run's YAML")
    ] = None,
    base: Base = None,
    data_root: Annotated[str | None, typer.Option(help="of a model: folder that the benchmark's files lie in")] = None,
    output: Annotated[Path | None, typer.Option(help="of a model: folder for answers and scores")] = None,
) -> None:
    """Ask a saved run, a model or an adapter, and grade it, without training.

    Example: mllm-keeplora eval runs/mini_dcl --after 3 --domains RS,Med
    Example: mllm-keeplora eval tiny-llava --benchmark mini_dcl --output runs/zero_shot
    Example: mllm-keeplora eval exported/merged --benchmark my_run.yaml
    """
    from mllm_keeplora.errors import UserError
    from mllm_keeplora.system import watch
    from mllm_keeplora.system.distributed import is_main, process_group
    from mllm_keeplora.system.log import start_logging

    # An option that belongs to the other kind of target is refused.
    is_run = (Path(target) / "run.json").is_file()
    if benchmark is None and not is_run:
        raise UserError(f"{target} is not a run directory; to ask a model or an adapter, name a --benchmark")
    of_others = {"--benchmark": benchmark, "--base": base, "--data-root": data_root, "--output": output}
    of_runs = {"--after": after, "--suite": suite}
    misplaced = [name for name, value in (of_others if is_run else of_runs).items() if value is not None]
    if misplaced:
        kind = "a run" if is_run else "a model or an adapter"
        raise UserError(f"{target} is {kind}, for which there is no {misplaced[0]}")
    start_logging()
    names = [name.strip() for name in domains.split(",")] if domains is not None else None
    size = 1 if exact else batch_size
    with process_group(), watch.watched():
        watch.enter("evaluate")
        if benchmark is None:
            from mllm_keeplora.eval.saved import evaluate as evaluate_run
            from mllm_keeplora.eval.saved import load_run
            from mllm_keeplora.report.page import refresh_results

            saved = load_run(target)
            scores = evaluate_run(saved, after, names, suite, size)
            refresh_results(saved)
        else:
            from mllm_keeplora.eval.checkpoints import Checkpoint, evaluate_checkpoint

            overrides = [f"eval.batch_size={size}"] if size is not None else []
            overrides += [f"data_root={data_root}"] if data_root is not None else []
            folder = output or Path("runs") / f"eval-{Path(target).name}"
            scores = evaluate_checkpoint(Checkpoint.named(target, base), benchmark, folder, names, overrides)
            typer.echo(f"scores   {folder}/scores.json", err=True)
    if is_main():
        for name, percent in scores.items():
            typer.echo(f"{name:<12} " + ("not graded" if percent is None else f"{percent:6.2f}"))


def ask(
    target: Target,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="<image>, <video>: a place in the text")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="a picture; may be given several times")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="a clip; may be given several times")] = None,
    after: After = None,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    domain: Annotated[
        str | None, typer.Option(help="of a run: whose branch answers, where each has one; of a CLIP, whose classes")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="of a CLIP: comma-separated names to choose from")] = None,
) -> None:
    """Ask a saved run, a model or an adapter one question.

    Example: mllm-keeplora ask runs/mini_dcl --image photo.png "what do you see ?"
    Example: mllm-keeplora ask tiny-clip --image photo.png --classes "cat, dog"
    """
    from mllm_keeplora.eval.asking import ask as ask_one
    from mllm_keeplora.system.log import start_logging

    start_logging()
    names = [name.strip() for name in classes.split(",")] if classes is not None else None
    typer.echo(ask_one(target, question, image or (), after, base, max_new_tokens, domain, names, video or ()))


def rescore(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]) -> None:
    """Grade a run's stored answers again by the scorers as they are now; no model is loaded.

    Example: mllm-keeplora rescore runs/mini_dcl
    """
    from mllm_keeplora.eval.saved import load_run
    from mllm_keeplora.eval.saved import rescore as rescore_run
    from mllm_keeplora.report.page import refresh_results

    saved = load_run(run)
    told = rescore_run(saved)
    refresh_results(saved)
    moved = [each for each in told if each[2] != each[3]]
    for unit, name, before, now in moved:
        typer.echo(f"{unit} {name}: " + " -> ".join("not graded" if s is None else f"{s:.2f}" for s in (before, now)))
    typer.echo(f"{len(told)} sets graded again, {len(moved)} scores moved")
