"""A tiny base, tiny data and whole tiny runs over them, made once for all integration tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import caller
from tests.integration.processes import run_in_child
from tests.support.tiny import tiny_benchmark, tiny_config, write_tiny_data, write_tiny_llava
from tests.support.undrawn import leave_drawing_out

TRAIN, TEST = 12, 8  # records a domain: with batches of 4 and two epochs six optimiser steps, two batches of questions

OPTIONS = {  # what a strategy needs to run on the tiny world; all questions begin with the same one
    "disco": {"modality": "both"},
    "gainlora": {"pictures": True, "base_options": {"feature_samples": TRAIN}},
    "keeplora": {"grad_samples": TRAIN, "feature_samples": TRAIN},
    "loda": {"feature_samples": TRAIN, "rho_max": 0.3},
    "merged": {"rule": "regmean", "samples": TRAIN},
    "moelora": {"experts": 2},
    "owm": {"feature_samples": TRAIN},
}

TRAINED = {  # what a strategy trains in the tiny world, where that is not A and B of every layer
    "gainlora": {"B", "down", "up", "key"},
    "inflora": {"B"},
    "keeplora": {"B"},
    "loda": {"B"},
    "moelora": {"A", "B", "weight"},
    "mtl_lora": {"B", "transform", "logits"},
    "sdlora": {"A", "B", "moved"},
}


# and in the first domain, where that differs
TRAINED_AT_FIRST = {"loda": {"A", "B"}, "mtl_lora": {"A", "B", "transform", "logits"}}


def strategy_of(name: str) -> dict[str, Any]:
    """A strategy's settings in the tiny world."""
    return {"name": name, "rank": 4, "alpha": 8, **OPTIONS.get(name, {})}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with `base`, `other_base` (the same but for its weights) and `data` of three domains."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = tmp_path_factory.mktemp("world")
    write_tiny_llava(root / "base")
    write_tiny_llava(root / "other_base", seed=1)
    write_tiny_data(root / "data", train=TRAIN, test=TEST)
    return root


@pytest.fixture(scope="session")
def settings(world) -> Callable:
    """Function (output, domains=("Alpha", "Beta"), **changes) -> the config of a tiny run that does learn something."""

    def build(output: Path, domains: tuple[str, ...] | None = ("Alpha", "Beta"), **changes) -> dict:
        changes["train"] = {"lr": 3e-2, "epochs": 2, **changes.get("train", {})}
        changes.setdefault("strategy", {"grad_samples": TRAIN, "feature_samples": TRAIN})
        changes["eval"] = {"batch_size": 4, **changes.get("eval", {})}
        changes.setdefault("benchmark", tiny_benchmark(world / "data"))
        order = list(domains) if domains is not None else None
        return tiny_config(world / "base", world / "data", output, domains=order, **changes)

    return build


@pytest.fixture(scope="session")
def two(settings, tmp_path_factory) -> Path:
    """A run over Alpha and Beta, never interrupted. Read only: copy it before anything changes it."""
    return _whole(settings, tmp_path_factory.mktemp("runs") / "two")


@pytest.fixture(scope="session")
def three(settings, tmp_path_factory) -> Path:
    """A run over all three domains at once, never interrupted. Read only."""
    return _whole(settings, tmp_path_factory.mktemp("runs") / "three", ("Alpha", "Beta", "Gamma"))


@pytest.fixture
def command(monkeypatch, capsys) -> Callable:
    """Function (*words) -> what `mllm-keeplora` says to them: `code`, `out`, `err`."""
    return caller(monkeypatch, capsys)


@pytest.fixture(scope="module", autouse=True)
def undrawn(request):
    """Pages have no pictures, but in modules that say `DRAWN = True` since they look at them."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWN", False):
            leave_drawing_out(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """Close the log file that a run in this process opened."""
    yield
    for handler in list(logging.getLogger("mllm_keeplora").handlers):
        logging.getLogger("mllm_keeplora").removeHandler(handler)
        handler.close()


def _whole(settings: Callable, output: Path, domains: tuple[str, ...] = ("Alpha", "Beta")) -> Path:
    assert run_in_child(settings(output, domains)) == 0
    return output
