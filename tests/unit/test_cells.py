"""Cells run side by side; what is interrupted stops at once and starts nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mllm_keeplora import cells
from mllm_keeplora.cells import Cell, Runner
from mllm_keeplora.errors import UserError


@pytest.fixture
def sleeping(monkeypatch, tmp_path):
    """Function (seconds, count) -> cells whose processes only sleep; started commands are kept in `started`."""
    started = []
    real = subprocess.Popen

    def popen(command, **options):
        started.append(command)
        seconds, _, code = command[4].partition(":")
        return real([sys.executable, "-c", f"import time; time.sleep({seconds}); exit({code or 0})"], **options)

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


def test_a_run_that_went_wrong_by_itself_is_no_result_and_the_others_go_on(sleeping):
    assert Runner(1).run(sleeping("0:1", 2), "test") == [None, None]
    assert len(sleeping.started) == 2


@pytest.mark.parametrize("code", [2, 130, 137])
def test_a_run_that_was_refused_or_killed_stops_the_sweep_with_its_log(sleeping, code):
    with pytest.raises(UserError, match=rf"cell0 ended with code {code}; see .*cell0\.log"):
        Runner(1).run(sleeping(f"0:{code}", 3), "test")


def test_termination_ends_what_runs_like_an_interrupt(sleeping):
    runner = Runner(1)

    def terminate():
        while not runner.processes:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate).start()
    with pytest.raises(KeyboardInterrupt):
        runner.run(sleeping(60, 2), "test")
    assert len(sleeping.started) == 1 and not runner.processes
    assert signal.getsignal(signal.SIGTERM) is before
