"""The package as users get it: a wheel in an environment of its own, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, sys, mllm_keeplora
print(mllm_keeplora.__file__)
modules = [each.name for each in pkgutil.walk_packages(mllm_keeplora.__path__, "mllm_keeplora.")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(modules))
from mllm_keeplora.__main__ import main
sys.argv[0] = "mllm-keeplora"
main()
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Function (*words) -> what a program of the fresh environment says; the environment sees this one's libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: what an earlier build left in the checkout must not come along
    for name in ("mllm_keeplora", "eval", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *build], check=True, capture_output=True, cwd=folder)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    # A folder named by a .pth file is searched, but its own .pth files are not: this checkout stays out of sight.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)

    def say(*words) -> str:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([*map(str, words)], cwd=folder, env=kept, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    say.folder, say.bin = folder, python.parent
    return say


def test_a_command_lists_every_module_imports_and_a_shortened_run_learns(program, world, tmp_path):
    assert "keeplora" in program(program.bin / "mllm-keeplora", "list", "strategies")
    values = tiny_config(world / "base", world / "data", tmp_path / "run", domains=["Alpha"])
    values["eval"] |= {"limit": 2, "zero_shot": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = program(program.bin / "python", "-c", IMPORT_ALL, "run", tmp_path / "run.yaml")
    home, count = said.splitlines()[:2]
    assert Path(home).is_relative_to(program.folder)
    files = [*(ROOT / "mllm_keeplora").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    assert int(count) >= len(files) - 1  # but for the package's own __init__
    assert "report" in said and "Alpha" in (tmp_path / "run/report.html").read_text()
    assert (tmp_path / "run/results.json").is_file()
