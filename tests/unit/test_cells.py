"""Cells run side by side; what is interrupted stops at once and starts nothing more."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from mllm_keeplora import cells
from mllm_keeplora.cells import Cell, Runner


@pytest.fixture
def sleeping(monkeypatch, tmp_path):
    """Function (seconds, count) -> cells whose processes only sleep; started commands are kept in `started`."""
    started = []
    real = subprocess.Popen

    def popen(command, **options):
        started.append(command)
        return real([sys.executable, "-c", f"import time; time.sleep({command[4]})"], **options)

    monkeypatch.setattr(cells.subprocess, "Popen", popen)
    monkeypatch.setattr(Cell, "results", lambda self: None)

    def make(seconds, count):
        return [Cell(str(seconds), (), tmp_path / f"cell{i}") for i in range(count)]

    make.started = started
    return make


def test_every_cell_gets_its_share_of_the_cores(sleeping, monkeypatch):
    monkeypatch.setattr(cells.os, "cpu_count", lambda: 6)
    assert Runner(2).run(sleeping(0, 3), "test") == [None] * 3
    assert [command[-1] for command in sleeping.started] == ["threads=3"] * 3


def test_an_interrupt_ends_what_runs_and_starts_nothing_more(sleeping, monkeypatch):
    runner = Runner(2)

    def interrupt():
        while len(runner.processes) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    class Interrupted(cells.ThreadPoolExecutor):
        def map(self, function, items):
            futures = [self.submit(function, item) for item in items]
            interrupt()
            return futures

    monkeypatch.setattr(cells, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(sleeping(60, 5), "test")
    assert len(sleeping.started) == 2 and not runner.processes
