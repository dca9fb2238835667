"""What runs and bases keep: ledgers, answers, results, adapters, configs of models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fuzzing.samples import Target, run_values


def runs_of(home: Path, data: Path) -> list[Target]:
    """Lay out a finished run of two domains, as far as commands read it that load no model."""
    from mllm_keeplora.config import as_yaml, parse_config
    from mllm_keeplora.data import load_benchmark
    from mllm_keeplora.eval.grading import FIGURES, write_graded
    from mllm_keeplora.eval.saved import load_run, rescore
    from mllm_keeplora.identity import Identity, environment
    from mllm_keeplora.models.family import Answer
    from mllm_keeplora.report.compared import load_results, write_comparison
    from mllm_keeplora.report.page import refresh_results, unit_facts
    from mllm_keeplora.report.render.diagnostics import inspection
    from mllm_keeplora.report.render.export import exported, run_tables
    from mllm_keeplora.report.render.tables import compare_table, results_table
    from mllm_keeplora.runs import BASE_UNIT, Ledger, RunDir, now
    from mllm_keeplora.stages.units import plan_units
    from mllm_keeplora.system import files

    folder = home / "finished"
    values = {**run_values(home, data), "strategy": {"name": "finetune"}, "output": str(folder)}
    config = parse_config(values, "fuzz")
    benchmark = load_benchmark(config)
    identity = Identity.of_config(config, benchmark, "0123456789abcdef")
    units = plan_units(list(benchmark.domains), "sequential")
    entry, stages = (
        {"seconds": 1.0, "peak_memory_bytes": 1000},
        {"prepare": {"seconds": 1.0, "peak_memory_bytes": 1000}},
    )
    sets = [*benchmark.domains, *benchmark.suites]
    run = RunDir(folder)
    for unit in (BASE_UNIT, *units):
        for stage in ("train", "consolidate") if unit.index else ():
            stages[f"{unit.key}/{stage}"] = {**entry, "trained_parameters": 10}
        for name in sets:
            records = benchmark.test_records(name)
            answers = [Answer("red" if number else "blue", False) for number in range(len(records))]
            how = {"batch_size": 2, "max_new_tokens": 4, "dtype": "float32"}
            write_graded(run.folder(unit).predictions(name), benchmark.graded(name), records, answers, how)
            stages[f"{unit.key}/evaluate/{name}"] = {**entry, "questions": len(records), "score": 66.7}
        if unit.index:
            files.write_json(
                run.folder(unit).manifest, {"combine": "merge", "start_from": "previous", "adapter": "adapter"}
            )
            inside = {"layers.0.q": {"interference": 0.1, "covered": [0.5, 0.1, 0.1]}}
            diagnosed = {
                "capacity": {"layers.0.q": {"d_in": 8, "parts": [3, 1, 1], "free": 3}},
                "changes": {"layers.0.q": {"update": 0.1, "leak": 1e-7}},
                "inputs": dict.fromkeys(benchmark.domains, inside),
            }
            files.write_json(run.folder(unit).diagnostics, diagnosed)
            shares = {"protected": 0.5, "captured": 0.2, "discarded": 0.3, "captured_of_residual": 0.4}
            files.write_json(run.folder(unit).gradient, {"gradient": {"layers.0.q": shares}})
    files.write_text(run.config_file, as_yaml(config.resolved()))
    run.ledger = Ledger(
        name="fuzzed",
        created=now(),
        environment=environment(),
        benchmark="own",
        base={"name": "tiny-llava", "fingerprint": None},
        seed=0,
        parent=None,
        config=dict(identity.config),
        domains=list(identity.domains),
        units=units,
        suites=list(identity.suites),
        stages=stages,
    )
    run.save()

    def told(path: Path) -> None:
        saved = load_run(folder)
        Identity.of_ledger(saved.run.ledger).differences(identity, "fuzz")
        for name in saved.names:
            saved.changed_files(name)
        inspection(unit_facts(saved.run))
        values = refresh_results(saved).to_dict()
        results_table(values)
        exported(run_tables(values))

    def graded(path: Path) -> None:
        told(path)
        rescore(folder)

    def compared(path: Path) -> None:
        results = load_results([path, other])
        compare_table(results)
        write_comparison(home / "comparison", "fuzz", results)
        for values in results:
            results_table(values)
            exported(run_tables(values))

    told(folder)
    other = home / "other/results.json"
    other.parent.mkdir()
    shutil.copyfile(run.results_file, other)
    results = json.loads(other.read_text())
    other.write_text(json.dumps({**results, "seed": 1}))
    predictions = run.folder(units[-1]).predictions("Lamps")
    figures = predictions.with_suffix(FIGURES)
    found = [
        ("ledger", "json", run.ledger_file, told),
        ("ledger", "json", run.ledger_file, told),
        ("run's config.yaml", "yaml", run.config_file, told),
        ("predictions", "lines", predictions, graded),
        ("figures", "json", figures, graded),
        ("manifest", "json", run.folder(units[-1]).manifest, told),
        ("diagnostics", "json", run.folder(units[-1]).diagnostics, told),
        ("gradient", "json", run.folder(units[-1]).gradient, told),
    ]
    told_results = home / "results/results.json"
    told_results.parent.mkdir()
    shutil.copyfile(run.results_file, told_results)
    found += [("results.json", "json", told_results, compared), ("results.json", "json", told_results, compared)]
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restored(read: Callable[[Path], None]) -> Callable[[Path], None]:
        def whole(path: Path) -> None:
            for each, content in kept.items():  # what an earlier case has rewritten
                if each != path and (not each.is_file() or each.read_bytes() != content):
                    each.write_bytes(content)
            read(path)

        return whole

    return [Target(name, kind, path, path.read_bytes(), restored(read)) for name, kind, path, read in found]


def bases_of(home: Path) -> list[Target]:
    import torch
    from safetensors.torch import save

    from mllm_keeplora.adapters.factors import Branch, Factors, peft_settings
    from mllm_keeplora.adapters.prototypes import Prototypes
    from mllm_keeplora.checks.classes import prompt_faults
    from mllm_keeplora.checks.records import load_family
    from mllm_keeplora.checks.run import _anatomy
    from mllm_keeplora.config import parse_config
    from mllm_keeplora.data.classes import ClassList
    from mllm_keeplora.errors import several
    from mllm_keeplora.eval.checkpoints import Checkpoint
    from mllm_keeplora.models.base import refuse_original_llava
    from mllm_keeplora.models.fingerprint import fingerprint
    from mllm_keeplora.models.shipped import resolve, resolve_path
    from mllm_keeplora.training.deepspeed import zero_stage

    shipped, base = Path(resolve_path("tiny-llava")), home / "base"
    shutil.copytree(shipped, base)
    values = {
        **run_values(home, home),
        "base": {"model": str(base)},
        "benchmark": "mini_dcl",
        "domains": None,
        "per_domain": {},
    }
    config = parse_config(values, "fuzz")

    def anatomy(path: Path) -> None:
        resolve(config.base)
        fingerprint(base)
        refuse_original_llava(str(base), str(base))
        _anatomy(config, str(base), None, None, [])

    shutil.copytree(resolve_path("tiny-clip"), dual := home / "dual_base")
    dual_config = parse_config({**values, "base": {"model": str(dual)}}, "fuzz")
    classes = ClassList.of(["cat", "dog"], ["a photo of a {}.", "the {}"])

    def compares(path: Path) -> None:
        resolve(dual_config.base)
        fingerprint(dual)
        _anatomy(dual_config, str(dual), None, None, [])
        family = load_family(dual_config.base, str(dual))
        if faults := list(prompt_faults(classes, family.texts.tokenizer, family.texts.positions)):
            raise several(faults)
        family.example()

    def adapter(path: Path) -> None:
        Checkpoint.named(path.parent).config("mini_dcl", home / "out")
        Factors.load(path.parent)

    def engine(path: Path) -> None:
        zero_stage(str(path))

    layers = ["language_model.layers.0.q", "language_model.layers.1.q"]
    A, B = ({layer: torch.ones(shape) for layer in layers} for shape in ((2, 4), (3, 2)))
    folder = home / "adapter"
    Factors(A, B, dict.fromkeys(layers, 4.0)).save(folder)
    settings = {
        **peft_settings(dict.fromkeys(layers, 2), dict.fromkeys(layers, 4.0), 0.0),
        "base_model_name_or_path": str(base),
    }
    Branch(A, dict.fromkeys(layers, 4.0)).save(home / "branch.safetensors")
    prototypes = Prototypes(torch.ones(2, 3), classes.digest)
    prototypes.save(home / "prototypes.safetensors")
    Branch(A, dict.fromkeys(layers, 4.0), prototypes=prototypes).save(home / "dual_branch.safetensors")
    notes = {"prompt": "chat_template"}
    (folder / "mllm_keeplora.json").write_text(json.dumps(notes))
    tensors = save({"a": torch.ones(2), "b": torch.ones(3, 3)}, {"format": "pt"})
    zero = json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}).encode()

    def read(path: Path) -> None:
        from mllm_keeplora.system import files

        files.read_tensors(path), files.read_metadata(path)

    return [
        Target("base config.json", "json", base / "config.json", (base / "config.json").read_bytes(), anatomy),
        Target("tensors", "tensors", home / "some.safetensors", tensors, read),
        Target(
            "adapter tensors",
            "tensors",
            folder / "adapter_model.safetensors",
            (folder / "adapter_model.safetensors").read_bytes(),
            adapter,
        ),
        Target("adapter_config.json", "json", folder / "adapter_config.json", json.dumps(settings).encode(), adapter),
        Target(
            "branch tensors",
            "tensors",
            home / "branch.safetensors",
            (home / "branch.safetensors").read_bytes(),
            lambda path: Branch.load(path),
        ),
        Target(
            "prototypes",
            "tensors",
            home / "prototypes.safetensors",
            (home / "prototypes.safetensors").read_bytes(),
            lambda path: Prototypes.load(path).logits(torch.ones(1, 3)),
        ),
        Target(
            "prototypes of a branch",
            "tensors",
            home / "dual_branch.safetensors",
            (home / "dual_branch.safetensors").read_bytes(),
            lambda path: Branch.load(path),
        ),
        *(
            Target(f"dual base {file}", "json", dual / file, (dual / file).read_bytes(), compares)
            for file in ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
        ),
        Target("prompt notes", "json", folder / "mllm_keeplora.json", json.dumps(notes).encode(), adapter),
        Target("deepspeed json", "json", home / "zero.json", zero, engine),
    ]
