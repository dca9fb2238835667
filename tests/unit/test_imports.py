"""The order of the house: who may import whom, and what a bare import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = {"errors": set(), "linalg": set(), "metrics": set(), "mini": set()}  # nothing of the package outside themselves
FORBIDDEN = {"checks": {"stages", "sequence"}, "eval": {"strategies", "training", "probes"}}
FILES = ["__init__", "__main__", "config", "errors", "identity", "runs", "sequence"]  # in the entrance
SOURCES = {"mllm_keeplora": ROOT / "mllm_keeplora", "mllm_keeplora.eval": ROOT / "eval"}


def rooms() -> list[str]:
    """Rooms of the house from the top floor down, as CONTRIBUTING lists them; each may import those that follow it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Where things live")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.M)


ROOMS = ["__init__", *rooms()]


def paths() -> dict[str, Path]:
    """Dotted name of every module -> its file."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = paths()


def floor(module: str) -> int:
    """Larger is lower."""
    return ROOMS.index(part(module))


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


def test_every_room_has_a_row_and_every_row_a_room():
    assert len(MODULES) > 60
    assert len(ROOMS) == len(set(ROOMS))
    assert {part(module) for module in MODULES} == set(ROOMS)


def test_the_entrance_has_six_files_beside_its_init():
    assert sorted(path.stem for path in (ROOT / "mllm_keeplora").glob("*.py")) == FILES


def test_imports_run_downwards_only():
    seen = 0
    for module in MODULES:
        for imported, _ in imports(module):
            seen += 1
            inside = part(imported) == part(module)
            assert inside or floor(imported) > floor(module), f"{module} must not import {imported}"
    assert seen > 150


@pytest.mark.parametrize("room", FORBIDDEN)
def test_who_must_not_know_whom(room):
    modules = [module for module in MODULES if part(module) == room]
    assert len(modules) >= 4
    for module in modules:
        assert not {part(imported) for imported, _ in imports(module)} & FORBIDDEN[room], module


@pytest.mark.parametrize("room", PURE)
def test_the_lowest_rooms_know_nothing_of_the_package(room):
    modules = [module for module in MODULES if part(module) == room]
    assert modules
    for module in modules:
        assert {part(imported) for imported, _ in imports(module)} <= {room, *PURE[room]}, module


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
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "mllm_keeplora" in loaded
    assert not loaded & (HEAVY | set(also))
