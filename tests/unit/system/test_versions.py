"""A library of a major version that the tests never passed with is told of; the ones that are installed are not."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from mllm_keeplora.system import versions


def test_what_is_installed_has_been_tried():
    assert versions.untried() == []


def test_a_later_major_is_told_of(monkeypatch):
    installed = {"torch": "3.0.1", "numpy": "2.9"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(versions.metadata, "version", version)
    assert versions.untried() == ["torch 3.0.1 has not been tried; the tests have passed with versions up to 2.x"]


def test_every_library_that_moves_numbers_is_listed():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[0]
    needed = set(re.findall(r'^    "([a-z-]+)>=', project, re.MULTILINE))
    without_numbers = {"typer", "rich", "psutil", "pyyaml", "jinja2", "threadpoolctl", "matplotlib", "torchvision"}
    assert {*versions.TRIED} == (needed - without_numbers) | {"deepspeed", "bitsandbytes"}
