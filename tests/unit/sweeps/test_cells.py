"""Cells run side by side; what is interrupted stops at once and starts nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from mllm_keeplora.runs import RunDir
from mllm_keeplora.sweeps import cells
from mllm_keeplora.sweeps.cells import Cell, Runner, Told, ending_as_a_run

POPEN = subprocess.Popen
DONE = SimpleNamespace(metrics={})


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


@pytest.mark.parametrize("code", [75, 129, 130, 138, 143])
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


# -- signals, and what a sweep that was killed has left --------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_sweep_that_is_told_to_stop_ends_with_a_run_s_code(sleeping, number, code):
    runner, before = Runner(1), signal.getsignal(number)

    def tell():
        while not runner.processes:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    with pytest.raises(SystemExit) as stop, ending_as_a_run():
        runner.run(sleeping(60, 2), "test")
    assert stop.value.code == code and len(sleeping.started) == 1 and not runner.processes
    assert signal.getsignal(number) is before


def test_a_sweep_started_to_outlive_its_terminal_does(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_as_a_run():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_follow_do_not_let_a_sweep_leave_runs_that_still_save(monkeypatch, tmp_path):
    """A run that saves takes its time; a scheduler and a terminal tell more than once."""
    saving = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(2), sys.exit(75))); time.sleep(60)"
    monkeypatch.setattr(cells.subprocess, "Popen", lambda _, **more: POPEN([sys.executable, "-c", saving], **more))
    monkeypatch.setattr(Cell, "results", lambda self: None)
    runner, processes = Runner(1), []

    def tell():
        while not runner.processes:
            time.sleep(0.01)
        processes.extend(runner.processes)
        time.sleep(1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=tell).start()
    with pytest.raises(Told):
        runner.run([Cell("x", (), tmp_path / "cell")], "test")
    assert [process.returncode for process in processes] == [75]


def test_a_terminal_s_signals_reach_the_sweep_alone(sleeping, monkeypatch):
    groups, real = [], cells.subprocess.Popen

    def popen(command, **options):
        process = real(command, **options)
        groups.append(os.getpgid(process.pid))
        return process

    monkeypatch.setattr(cells.subprocess, "Popen", popen)
    Runner(1).run(sleeping(0.5, 1), "test")
    assert groups and os.getpgid(0) not in groups


@pytest.fixture
def orphan(tmp_path, monkeypatch):
    """Function (seconds) -> a process that works on cell0 for so long and then leaves its results."""
    monkeypatch.setattr(cells, "POLL_S", 0.05)
    monkeypatch.setattr(Cell, "results", lambda self: DONE if (self.folder / "done").exists() else None)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mllm_keeplora.runs import RunDir\n"
        "run = RunDir(sys.argv[1])\nwith run.locked():\n    (run.path / 'run.json').write_text('{}')\n"
        "    time.sleep(float(sys.argv[2]))\n    (run.path / sys.argv[3]).write_text('')\n"
    )
    started = []

    def start(seconds, leaves="done"):
        process = POPEN([sys.executable, "-c", code, str(tmp_path / "cell0"), str(seconds), leaves])
        started.append(process)
        until = time.monotonic() + 60
        while RunDir(tmp_path / "cell0").user() is None and time.monotonic() < until:
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_run_that_another_process_works_on_is_waited_for_and_its_results_are_taken(sleeping, orphan, caplog):
    """As a killed sweep leaves it."""
    cell = sleeping("0:2", 1)[0]  # a second process on the same run would be refused
    process = orphan(1.5)
    with caplog.at_level("INFO", logger="mllm_keeplora"):
        (results,) = _results_of(cell)
    assert results is DONE and sleeping.started == []
    assert caplog.text.count(f"waiting for (pid {process.pid}) on") == 1


def test_a_run_that_another_process_leaves_unfinished_is_continued(sleeping, orphan):
    orphan(0.5, leaves="half")
    (results,) = _results_of(sleeping(0, 1)[0])
    assert results is None and len(sleeping.started) == 1


def test_a_run_that_another_process_takes_in_the_meantime_is_waited_for(sleeping, orphan, monkeypatch):
    """Both look into the data first; then one of them is refused."""
    cell = sleeping("0:2", 1)[0]
    monkeypatch.setattr(Runner, "_wait_for_others", _once_late(Runner._wait_for_others))
    orphan(2)
    (results,) = _results_of(cell)
    assert results is DONE and len(sleeping.started) == 1


def test_a_sweep_that_waits_for_another_process_can_be_told_to_stop(sleeping, orphan):
    process = orphan(30)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Told):
        Runner(1).run(sleeping(0, 1), "test")
    assert process.poll() is None and sleeping.started == []


def test_a_run_that_was_killed_is_continued_once(monkeypatch, tmp_path):
    started = []

    def popen(command, **options):
        started.append(command)
        return POPEN([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(cells.subprocess, "Popen", popen)
    monkeypatch.setattr(Cell, "results", lambda self: None)
    assert Runner(1).run([Cell("x", (), tmp_path / "cell")], "test") == [None]
    assert len(started) == 2


def _results_of(cell):
    return Runner(1).run([cell], "test")


def _once_late(real):
    calls = []

    def wait(runner, cell):
        calls.append(cell)
        return real(runner, cell) if len(calls) > 1 else None

    return wait
