"""Lists of classes, class records, benchmarks of them, and what `ask --classes` is given."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

from fuzzing.samples import Target, encoded, run_values

NAMES = ["cat", "dog", "sea horse"]


def class_rows() -> list[dict]:
    return [
        {"id": name, "image": f"images/{name}.png", "label": label} for name, label in zip("abc", NAMES, strict=True)
    ]


def class_values(data: Path) -> dict:
    """A benchmark of two domains and a suite, whose classes stand in a file, or in published files."""
    here = {key: f"{data}/class_rows.json" for key in ("train", "test")}
    first = {**here, "classes": f"{data}/names.json", "prompts": ["a {}.", "the {}"], "question": "Which?"}
    second = {key: f"{data}/split.json" for key in ("train", "validation", "test")}
    second |= {"layout": "coop", "counts": {"classes": 3, "train": 3, "test": 3}}
    suite = {"test": f"{data}/class_rows.json", "classes": f"{data}/names.json"}
    return {
        "name": "own",
        "candidates": "all",
        "defaults": {"scorer": "exact", "prompts": ["a photo of a {}."], "question": "What is shown?"},
        "domains": {"First": first, "Second": second},
        "suites": {"general": suite},
    }


def class_run_values(home: Path, data: Path) -> dict:
    strategy = {"name": "keeplora", "rank": 4, "alpha": 8, "prototypes": "cosine", "prototype_scale": 30.0}
    values = {**run_values(home, data), "base": {"model": "tiny-clip", "task": "classify"}, "domains": None}
    values |= {"benchmark": class_values(data), "strategy": strategy, "per_domain": {}, "shots": 1}
    return {**values, "eval": {**values["eval"], "prompts": "ensemble"}}


def classes_of(home: Path, data: Path) -> list[Target]:
    import yaml

    from mllm_keeplora.checks.classes import class_faults
    from mllm_keeplora.cli.evaluation import ask
    from mllm_keeplora.config import load_config, parse_config
    from mllm_keeplora.data import load_benchmark
    from mllm_keeplora.data.media.images import images_of
    from mllm_keeplora.data.naming import make_naming, read_class_file
    from mllm_keeplora.data.readers import read_test, read_train
    from mllm_keeplora.errors import several
    from mllm_keeplora.identity import Identity
    from mllm_keeplora.strategies import build_strategy

    listed = {"names": NAMES, "prompts": ["a {}.", "the {}"], "labels": NAMES[::-1], "source": "hand"}
    split = {
        part: [[f"images/{name}.png", n, NAMES[n]] for n, name in enumerate("abc")] for part in ("train", "val", "test")
    }
    (data / "names.json").write_text(json.dumps(NAMES))
    (data / "class_rows.json").write_text(json.dumps(class_rows()))
    (data / "split.json").write_text(json.dumps(split))

    def naming_of(path: Path):
        naming = make_naming(read_class_file(path), None, None, "Which?", "fuzz")
        naming.digest.encode()
        if naming.faults:
            raise several(list(naming.faults))
        return naming

    def records(path: Path) -> None:
        naming = naming_of(data / "names.json")
        for record in (*read_train(path, data, naming=naming), *read_test(path, data, naming=naming)):
            images_of(record)
            f"{record.question}{record.answer}{record.id}".encode()

    def read_all(config) -> None:
        """Read what a run reads of its benchmark before it loads a model."""
        benchmark = load_benchmark(config)
        benchmark.after(list(benchmark.domains)[:1])
        faults = [fault for name in (*benchmark.domains, *benchmark.suites) for fault in class_faults(benchmark, name)]
        for name in benchmark.domains:
            len(benchmark.train_records(name)), benchmark.candidates_of(name, benchmark.domains)
        for name in (*benchmark.domains, *benchmark.suites):
            list(map(benchmark.graded(name).suffix_for, benchmark.test_records(name)))
        Identity.of_config(config, benchmark, None).digest()
        if faults:
            raise several(faults)

    def benchmark(path: Path) -> None:
        read_all(parse_config({**class_run_values(home, data), "benchmark": str(path)}, "fuzz"))

    def run(path: Path) -> None:
        config = load_config(path)
        build_strategy(config.strategy, "fuzz")
        read_all(config)

    def choice(path: Path) -> None:
        text = path.read_bytes()[: 1 << 16].replace(b"\0", b"").decode(errors="surrogateescape")  # as arguments are
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            ask("tiny-clip", None, [home / "shown.png"], max_new_tokens=4, classes=text)

    def as_yaml(values: dict) -> bytes:
        return yaml.safe_dump(values, sort_keys=False).encode()

    def as_json(values: object) -> bytes:
        return json.dumps(values).encode()

    (home / "shown.png").write_bytes(encoded())
    rows = b"".join(as_json(row) + b"\n" for row in class_rows())
    read: list[tuple[str, str, str, bytes, Callable[[Path], object]]] = [
        ("class file, list", "json", "list.json", as_json(NAMES), naming_of),
        ("class file", "json", "listed.json", as_json(listed), naming_of),
        ("class records json", "json", "class_rows.json", as_json(class_rows()), records),
        ("class records jsonl", "lines", "class_rows.jsonl", rows, records),
        ("class benchmark", "yaml", "class_benchmark.yaml", as_yaml(class_values(data)), benchmark),
        ("class run config", "yaml", "class_run.yaml", as_yaml(class_run_values(home, data)), run),
        ("class names to ask", "words", "asked.txt", b"cat, dog, sea horse", choice),
    ]
    return [Target(name, kind, home / file, valid, reader) for name, kind, file, valid, reader in read]
