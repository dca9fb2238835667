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
