"""A package outside the tree with a strategy, a scorer, a benchmark and a reader: run, resumed, compared, gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mllm_keeplora.config import parse_config
from tests.integration.commands import shell
from tests.integration.processes import artefacts, command_in_child, differing, results, run_in_child
from tests.support.plugins import registries_restored
from tests.support.tiny import tiny_benchmark

METHODS = '''
"""What my lab adds."""

from pathlib import Path

from mllm_keeplora.strategies.baselines.finetune import Finetune


class Halved(Finetune):
    """Sequential LoRA that learns half as loud."""

    def before_domain(self, context):
        context.log({"halved": True})
        return super().before_domain(context)

    def around_step(self, context, phase, step):
        if phase == "grad":
            for parameter in context.branches.trainable().values():
                parameter.grad.mul_(0.5)


def first_letter(prediction, answer, question="", image=""):
    return float(prediction[:1].lower() == answer[:1].lower())


def read_table(path):
    for line in path.read_text().splitlines():
        number, image, text, answer = line.split("\\t")
        yield {"question_id": number, "image": image, "text": text, "answer": answer}


STRATEGIES = {"halved": Halved}
SCORERS = {"first_letter": first_letter}
BENCHMARKS = {"lab_squares": Path(__file__).parent / "squares.yaml"}
READERS = {".tsv": read_table}
'''


@pytest.fixture(scope="module")
def lab(world, tmp_path_factory) -> Path:
    """A folder that holds the package `my_lab`, its benchmark and data beside its module."""
    root = tmp_path_factory.mktemp("lab")
    package = root / "my_lab"
    shutil.copytree(world / "data", package / "data")
    (package / "__init__.py").write_text("")
    (package / "methods.py").write_text(METHODS)
    benchmark = tiny_benchmark(Path("data"), ("Alpha", "Beta"), suite=False)
    for name, part in benchmark["domains"].items():
        folder = package / "data" / name
        rows = json.loads((folder / "test.json").read_text())
        keys = ("question_id", "image", "text", "answer")
        (folder / "test.tsv").write_text("".join("\t".join(row[key] for key in keys) + "\n" for row in rows))
        part |= {"test": f"data/{name}/test.tsv", "validation": f"data/{name}/test.tsv", "scorer": "first_letter"}
    (package / "squares.yaml").write_text(yaml.safe_dump(benchmark))
    return root


@pytest.fixture
def on_path(lab, monkeypatch):
    """The package is importable, here and in processes that are started."""
    monkeypatch.setenv("PYTHONPATH", f"{lab}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(lab)
    with registries_restored():
        yield
    for name in ("my_lab.methods", "my_lab"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def values(lab, settings):
    """Function (output) -> a run's config that names the package."""

    def build(output: Path) -> dict:
        strategy = {"name": "halved", "rank": 4, "alpha": 8}
        return {**settings(output), "benchmark": "lab_squares", "strategy": strategy, "plugins": ["my_lab.methods"]}

    return build


@pytest.fixture(scope="module")
def whole(lab, values, tmp_path_factory) -> Path:
    """A run that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    (output.parent / "run.yaml").write_text(yaml.safe_dump(values(output)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{lab}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        said = command_in_child("run", output.parent / "run.yaml")
    assert said.code == 0, said.err
    return output


def test_a_run_knows_its_plugins(whole):
    assert yaml.safe_load((whole / "config.yaml").read_text())["plugins"] == ["my_lab.methods"]
    record = json.loads((whole / "run.json").read_text())
    assert list(record["plugins"]) == ["my_lab.methods"] and "plugins" not in record["config"]
    assert "plugins" not in results(whole)["settings"] and results(whole)["settings"]["strategy.name"] == "halved"
    assert json.loads((whole / "domains/01_Alpha/gradient.json").read_text())["halved"] is True
    rows = [json.loads(row) for row in (whole / "domains/02_Beta/predictions/Beta.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["score"] == (row["prediction"][:1] == row["answer"][:1]) for row in rows)


def test_killed_and_continued_it_ends_with_the_same_bytes(on_path, lab, values, whole, tmp_path):
    config = values(tmp_path / "run")
    kill = ("mllm_keeplora.training.fit:Reporter.on_step_end", 9)
    assert run_in_child(config, kill=kill) == -signal.SIGKILL
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    module = lab / "my_lab" / "methods.py"
    try:
        module.write_text(f"{METHODS}\n# a remark\n")
        said = command_in_child("run", tmp_path / "run.yaml")
    finally:
        module.write_text(METHODS)
    assert said.code == 0, said.err
    assert differing(whole, tmp_path / "run") == [] and artefacts(whole)
    (note,) = (note["text"] for note in json.loads((tmp_path / "run" / "run.json").read_text())["notes"])
    assert note.startswith("plugin changed: my_lab.methods: 'sha256:") and " now" in note


def test_names_of_a_plugin_are_listed(on_path, command):
    said = command("list", "strategies", "--plugins", "my_lab.methods")
    assert said.code == 0 and "halved       Sequential LoRA that learns half as loud.\n" in said.out
    assert "lab_squares\n" in command("list", "benchmarks", "--plugins", "my_lab.methods").out
    assert command("list", "strategies", "--plugins", "no_lab").code == 2


def test_a_benchmark_of_a_plugin_is_asked_without_a_run(on_path, world, whole, tmp_path):
    words = (world / "base", "--benchmark", whole.parent / "run.yaml", "--domains", "Beta", "--output", tmp_path)
    said = command_in_child("eval", *words)
    assert said.code == 0, said.err
    assert said.out.split() == ["Beta", f"{results(whole)['zero_shot'][1]:.2f}"]


@pytest.mark.slow
def test_a_sweep_compares_a_plugin_with_what_is_built_in(on_path, whole, tmp_path):
    sweep = {
        "name": "own",
        "run": str(whole.parent / "run.yaml"),
        "strategies": {"halved": [], "finetune": ["strategy.name=finetune"]},
        "tune": {"grid": [1e-2], "extensions": 0},
        "final": {"seeds": [1]},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    said = shell("sweep", tmp_path / "sweep.yaml")
    assert said.code == 0, said.err + said.out
    assert "halved" in said.out and "finetune" in said.out
    names = {results(path.parent)["settings"]["strategy.name"] for path in (tmp_path / "out").glob("final/*/run.json")}
    assert names == {"halved", "finetune"}


@pytest.mark.parametrize("words", [("eval",), ("report",), ("rescore",), ("export", "DIR"), ("ask", "where ?")])
def test_without_its_package_a_finished_run_says_so_in_one_sentence(words, whole, tmp_path, command):
    assert not any("my_lab" in entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep))
    name, *others = (str(tmp_path / "out") if word == "DIR" else word for word in words)
    before = artefacts(whole)
    said = command(name, whole, *others)
    assert said.code == 2
    assert said.err == (
        "error: plugins: my_lab.methods cannot be imported (No module named 'my_lab'); install it, or put the folder "
        f"that it lies in on PYTHONPATH ({whole}/config.yaml)\n"
    )
    assert artefacts(whole) == before and not (tmp_path / "out").exists()
    for reader in ("inspect", "compare"):  # they need nothing of it
        assert command(reader, whole).code == 0


def test_neither_is_it_started(values, tmp_path):
    with pytest.raises(ValueError, match=r"my_lab\.methods cannot be imported"):
        parse_config(values(tmp_path / "run"), origin="test")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_lies_where_one_works_is_not_imported_because_a_run_names_it(two, tmp_path):
    """As `python -m` would: who is handed a folder with a run in it works there."""
    run = shutil.copytree(two, tmp_path / "run")
    for name in ("evil", "rich"):  # one that the run names, and one that stands before a library's
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nSTRATEGIES = {{}}\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "plugins": ["evil"]}))
    words = [sys.executable, "-m", "mllm_keeplora", "report", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.returncode == 2 and "plugins: evil cannot be imported" in said.stderr, said.stderr
    assert not (tmp_path / "marker").exists()
