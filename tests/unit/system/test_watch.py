"""How one process answers signals; what processes tell each other is in the integration tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mllm_keeplora.system import watch
from mllm_keeplora.system.watch import watcher
from mllm_keeplora.system.watch.signals import ENDING

SENTENCE = "stopped on SIGTERM; the same command continues the run\n"
HEAD = """
import os, signal, sys, time
from mllm_keeplora.system import watch
from mllm_keeplora.system.watch import watcher
"""
STUCK = """
with watch.watched():
    print("ready", flush=True)
    time.sleep(60)  # as in a long call: Python goes on with it after a signal
"""


@pytest.fixture
def program():
    """Function (text) -> a process that runs it and has said that it is ready."""
    started = []

    def start(text: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", HEAD + text], **pipes))
        assert started[-1].stdout.readline() == "ready\n", started[-1].stderr.read()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_that_comes_to_no_place_to_stop_at_ends_a_while_after_the_signal(program):
    process = program("watcher.GRACE_S = 0.5" + STUCK)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert process.stderr.read() == SENTENCE


def test_a_second_signal_ends_at_once_and_its_echo_does_not(program):
    process = program("watcher.GRACE_S, watcher.AGAIN_S = 600, 1" + STUCK)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


SAVING = """
watcher.GRACE_S = 0.5
with watch.watched():
    with watch.until_saved():
        print("ready", flush=True)
        while not watch.stop_agreed():
            time.sleep(0.01)
        time.sleep(1)  # writes a checkpoint
        watch.stop_here()
        print("saved", flush=True)
        watch.stop_saved()
"""


def test_nothing_ends_a_process_before_its_checkpoint_is_written(program):
    process = program(SAVING)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert process.stdout.read() == "saved\n"
    assert process.stderr.read() == SENTENCE


def _in_fork(work: Callable[[], None]) -> int:
    """Do something in a forked process, such as a data loader's worker is; returns how it ended."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_dies_of_a_signal_and_the_run_does_not_hear_of_it():
    with watch.watched():
        assert _in_fork(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        time.sleep(0.3)
        watch.stop_here()


def test_a_signal_is_answered_at_the_next_place_to_stop_at():
    before = [signal.getsignal(number) for number in ENDING]
    with pytest.raises(watch.Stopped) as stopped, watch.watched():
        os.kill(os.getpid(), signal.SIGUSR1)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            watch.stop_here()
    assert stopped.value.code == 75
    assert [signal.getsignal(number) for number in ENDING] == before
    watch.stop_here()  # nothing to stop any more


def test_only_errors_of_connections_may_be_echoes_of_a_failure_elsewhere():
    assert watcher._may_be_an_echo(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not watcher._may_be_an_echo(RuntimeError("the loss is nan"))
    assert not watcher._may_be_an_echo(ValueError("gloo"))


KEPT_FROM_CTRL_C = """
watcher.GRACE_S, watcher.AGAIN_S = 600, 600
with watch.watched():
    with watch.until_saved():
        print("ready", flush=True)
        while not watch.stop_agreed():
            time.sleep(0.01)
        time.sleep({saving})  # writes a checkpoint
        print("saved", flush=True)
        watch.stop_saved()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_ctrl_c_and_a_closed_terminal_wait_for_the_checkpoint(number, code, program):
    process = program(KEPT_FROM_CTRL_C.format(saving=0.5))
    process.send_signal(number)
    assert process.wait(20) == code
    assert process.stdout.read() == "saved\n"
    said = process.stderr.read()
    assert said.endswith("the same command continues the run\n") and "Traceback" not in said


def test_a_second_ctrl_c_ends_at_once(program):
    process = program(KEPT_FROM_CTRL_C.format(saving=60))
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends at once" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stdout.read() == ""
    assert process.stderr.read() == "stopped; the same command continues the run\n"


def test_ctrl_c_interrupts_at_once_what_has_no_checkpoint(program):
    process = program("watcher.GRACE_S = 600" + STUCK)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == "stopped; the same command continues the run\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_from_the_start_stays_ignored(number):
    """As the end of a terminal is under `nohup`, and Ctrl-C in the background of a script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with watch.watched():
            os.kill(os.getpid(), number)
            time.sleep(0.3)
            watch.stop_here()
    finally:
        signal.signal(number, before)


TERMINAL = """
import sys, time
from mllm_keeplora.system import watch
with watch.watched(), watch.until_saved():
    print("ready", flush=True)
    while not watch.stop_agreed():
        time.sleep(0.01)
    print("told to nobody", flush=True)  # an error on a terminal that is gone
    open(sys.argv[1], "w").write("saved")
    watch.stop_saved()
"""


def test_a_run_whose_terminal_is_closed_saves_and_says_nothing(tmp_path):
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", TERMINAL, str(tmp_path / "file")])
    said = b""
    while not said.endswith(b"ready\r\n"):  # the end of the line is written by itself
        said += os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert (tmp_path / "file").read_text() == "saved"
