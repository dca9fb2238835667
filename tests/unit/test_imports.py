"""The order of the house: who may import whom, what a bare import loads, how long files and functions may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOTTOM = ("errors", "files", "progress", "log", "linalg", "metrics", "distributed", "watch", "report", "launch")
LAYERS = (
    BOTTOM,
    ("config", "runs"),
    ("data",),
    ("models",),
    ("plans",),
    ("tokens",),
    ("hooks",),
    ("adapters",),
    ("probes",),
    ("strategies",),
    ("training",),
    ("eval",),
    ("record_check", "memory"),
    ("check", "opening", "sequence"),
    ("comparison", "cells", "sweep_plan", "sweep", "sweep_jobs"),
    ("cli_evaluation", "cli_sweep"),
    ("cli",),
    ("__main__", "__init__"),
)
# may import others of their own layer
SIBLINGS = {"check", "opening", "sequence", "comparison", "cells", "sweep_plan", "sweep", "sweep_jobs"}
FORBIDDEN = {"eval": {"strategies", "training", "probes"}}
ALONE = {"linalg": set(), "metrics": set(), "errors": set()}  # pure: nothing of the package outside themselves
SOURCES = {"mllm_keeplora": ROOT / "mllm_keeplora", "mllm_keeplora.eval": ROOT / "eval"}


def paths() -> dict[str, Path]:
    """Dotted name of every module -> its file."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = paths()


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part(module) in names)


def part(module: str) -> str:
    """The first name below the package, e.g. `data` for `mllm_keeplora.data.readers`."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    """Modules of the package that a module imports, each with whether at module level; those for types do not count."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    package = module if MODULES[module].name == "__init__.py" else _package_of(module)
    return tuple(dict.fromkeys(_walk(tree, True, package)))


def _walk(node: ast.AST, top: bool, package: str) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, top) for alias in child.names if alias.name in MODULES)
        elif isinstance(child, ast.ImportFrom):
            source = _absolute(child, package)
            for alias in child.names:
                whole = f"{source}.{alias.name}"
                if whole in MODULES or source in MODULES:
                    yield (whole if whole in MODULES else source), top
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, top and not inside, package)


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names, written out where it begins with dots."""
    if statement.level == 0:
        return statement.module
    parts = package.split(".")[: len(package.split(".")) - statement.level + 1]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


def _package_of(module: str) -> str:
    return module.rpartition(".")[0]


def test_every_module_has_a_place_in_the_order():
    assert len(MODULES) > 60
    assert {part(module) for module in MODULES} - {name for names in LAYERS for name in names} <= {"configs"}


def test_imports_run_downwards_only():
    seen = 0
    for module in MODULES:
        for imported, _ in imports(module):
            seen += 1
            assert layer(imported) <= layer(module), f"{module} must not import {imported}"
            if layer(imported) == layer(module) and layer(module) > 1:
                same = part(imported) == part(module) or part(module) in SIBLINGS
                assert same, f"{module} must not import {imported}"
    assert seen > 150


def test_evaluation_knows_no_strategy_and_no_training():
    modules = [module for module in MODULES if part(module) == "eval"]
    assert len(modules) >= 5
    for module in modules:
        reached = {part(imported) for imported, _ in imports(module)}
        assert not reached & FORBIDDEN["eval"], module


def test_algebra_and_metrics_know_nothing_of_the_package():
    for name, allowed in ALONE.items():
        modules = [module for module in MODULES if part(module) == name]
        assert modules
        for module in modules:
            assert {part(imported) for imported, _ in imports(module)} <= {name, *allowed}, module


def test_no_circle_of_imports_at_module_level():
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for imported, top in imports(module):
            if top and imported != module and imported != _package_of(module):
                visit(imported, (*trail, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == set(MODULES)


def test_the_check_of_circles_and_directions_sees_a_wrong_import(monkeypatch):
    wrong = {"mllm_keeplora.errors": (("mllm_keeplora.config", True),)}
    real = imports
    monkeypatch.setitem(globals(), "imports", lambda module: wrong.get(module) or real(module))
    with pytest.raises(AssertionError, match=r"errors must not import mllm_keeplora\.config"):
        test_imports_run_downwards_only()
    with pytest.raises(AssertionError, match=r"mllm_keeplora\.errors"):
        test_no_circle_of_imports_at_module_level()


LIBRARIES = {"torch", "transformers", "peft", "accelerate", "deepspeed", "datasets"}
HEAVY = LIBRARIES | {"matplotlib", "sklearn", "numpy", "PIL"}


@pytest.mark.parametrize(
    ("program", "also"),
    [
        ("import mllm_keeplora", ("typer", "rich", "pydantic", "yaml")),
        ("from mllm_keeplora.cli import app; app(['--help'], standalone_mode=False)", ("pydantic", "yaml")),
        ("from mllm_keeplora.cli import app; app(['run', '--help'], standalone_mode=False)", ("yaml",)),
        ("from mllm_keeplora import load_config; load_config('mini_dcl')", ()),
    ],
)
def test_a_light_call_loads_no_heavy_library(program, also):
    report = f"{program}\nimport sys\nprint('LOADED', *sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "mllm_keeplora" in loaded
    assert not loaded & (HEAVY | set(also))


def test_no_file_is_longer_than_300_lines_and_no_function_than_60():
    files = [path for path in MODULES.values() if path.stat().st_size]
    functions = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                assert node.end_lineno - node.lineno + 1 <= 60, f"{path}: {node.name}"
    assert len(files) > 60
    assert functions > 300
