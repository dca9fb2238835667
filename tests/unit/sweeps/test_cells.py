"""Cells run side by side; what is interrupted stops at once and starts nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mllm_keeplora.sweeps import cells
from mllm_keeplora.sweeps.cells import Cell, Runner


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

    monkeypatch.setattr(cells, "as_completed", lambda futures: interrupt())
    with pytest.raises(KeyboardInterrupt):
        runner.run(sleeping(60, 5), "test")
    assert len(sleeping.started) == 2 and not runner.processes


@pytest.mark.parametrize("code", [1, 2, 137, 134])
def test_a_run_that_failed_is_no_result_and_the_others_go_on(sleeping, code, caplog):
    """Of a fault of its own, refused, killed for its memory, aborted: told at once, with the end of its log."""
    todo = sleeping(f"0:{code}", 2)
    cells.log_of(todo[0].folder).write_text("much before\nerror: no room\n\n")
    with caplog.at_level("INFO", logger="mllm_keeplora"):
        assert Runner(1).run(todo, "test") == [None, None]
    assert len(sleeping.started) == 2
    assert f"cell0: failed with code {code}, see {cells.log_of(todo[0].folder)}: error: no room" in caplog.text


@pytest.mark.parametrize("code", [75, 130, 143])
def test_a_run_that_a_signal_ended_stops_the_others_to_be_continued(sleeping, code):
    """At once, and not when the runs before it are over."""
    runner, began = Runner(2), time.monotonic()
    first, second, third = [*sleeping(30, 1), *sleeping(f"0:{code}", 2)]
    with pytest.raises(KeyboardInterrupt):
        runner.run([first, second, third], "test")
    assert len(sleeping.started) == 2 and not runner.processes and time.monotonic() - began < 25


def test_an_interrupt_while_a_worker_starts_leaves_no_process(sleeping, monkeypatch):
    """The pool does not know the worker yet, and would not wait for it."""
    runner, start = Runner(1), threading.Thread.start

    def interrupted(thread):
        start(thread)
        while not runner.processes:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(sleeping(60, 2), "test")
    assert len(sleeping.started) == 1 and not runner.processes


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
