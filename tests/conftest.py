"""How tests are dealt out where two workers run: whole files, and those that start processes one after another."""

from __future__ import annotations

import gc
import logging
from pathlib import PurePath

import pytest

# They meet at free ports, which two at a time may find to be the same.
WITH_PROCESSES = {"edited_parameters", "failing_ranks", "launchers", "preemption", "scripts", "two_processes", "zero"}


def pytest_collection_finish() -> None:
    """Leave what is imported now out of garbage collections: each takes half a second, a training asks for two."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logged(request, monkeypatch):
    """Let `caplog` see what is told, also where a command of an earlier test has started the log of its own."""
    if "caplog" in request.fixturenames:
        monkeypatch.setattr(logging.getLogger("mllm_keeplora"), "propagate", True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A scheduler of our own: `loadgroup` of pytest-xdist 3.8 deals tests out singly under pytest 9.2, by its marks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "processes" if PurePath(file).stem.removeprefix("test_") in WITH_PROCESSES else file

    return ByFile(config, log)
