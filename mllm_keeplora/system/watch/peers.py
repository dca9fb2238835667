"""Lines of JSON between the processes of a run, beside its collectives: the main process hears every other one.

A collective cannot tell that a process has failed while the others wait for it. Here it says so; and if it was killed,
the kernel closes its connection. The kernel also finds out by itself when a whole machine is silent. So nothing is sent
again and again, and a process may compute, wait or be paused for as long as it likes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from mllm_keeplora.system import distributed

SILENCE_S = 40  # a machine whose kernel has not answered for so long is gone
CONNECT_S = 60  # all processes have passed a collective just before they connect


class Peers:
    """Connections between processes.

    Args:
        connections: by rank; the main process has one to every other, and every other has one to the main process.
        hosts: name of the machine of every rank.
    """

    def __init__(self, connections: dict[int, socket.socket], hosts: list[str]):
        self.connections = connections
        self.hosts = hosts
        self._unread = dict.fromkeys(connections, b"")
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any], but: int | None = None) -> None:
        """Say something to all at the other ends but one; who is gone is passed over, since `receive` will tell."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for rank, connection in self.connections.items():
                if rank != but:
                    try:
                        connection.sendall(line)
                    except OSError:
                        continue

    def receive(self, rank: int) -> tuple[list[dict[str, Any]], bool]:
        """What a process has said since the last call, and whether it is gone. Call it when there is something."""
        try:
            received = self.connections[rank].recv(1 << 16)
        except TimeoutError:
            return [], False
        except OSError:
            received = b""
        *lines, self._unread[rank] = (self._unread[rank] + received).split(b"\n")
        return [json.loads(line) for line in lines], not received

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()


def connect() -> Peers:
    """Connect all processes of the open process group; each calls it at the same time.

    Raises:
        RuntimeError: they do not reach each other.
    """
    own: dict[str, Any] = {"host": socket.gethostname()}
    listener = None
    if distributed.is_main():
        listener = _listen()
        own |= {"port": listener.getsockname()[1], "secret": secrets.token_hex(16)}
    told = distributed.gather(own)
    port, secret = told[0]["port"], told[0]["secret"]
    if listener is not None:
        with listener:
            connections = _accept(listener, secret)
    else:
        connections = {0: _call(port, secret)}
    for connection in connections.values():
        _mind_silence(connection)
    return Peers(connections, [each["host"] for each in told])


def _listen() -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=distributed.world_size(), dualstack_ipv6=both)


def _accept(listener: socket.socket, secret: str) -> dict[int, socket.socket]:
    """A connection to every other process; whoever does not know the secret is sent away."""
    connections: dict[int, socket.socket] = {}
    until = time.monotonic() + CONNECT_S
    while len(connections) < distributed.world_size() - 1:
        listener.settimeout(max(0.1, until - time.monotonic()))
        try:
            connection, _ = listener.accept()
            connection.settimeout(5)
            word, _, rank = _first_line(connection).partition(" ")
        except TimeoutError:
            if time.monotonic() < until:
                continue
            missing = sorted(set(range(1, distributed.world_size())) - set(connections))
            raise RuntimeError(f"ranks {missing} did not connect to the main process in {CONNECT_S} s") from None
        if secrets.compare_digest(word, secret):
            connections[int(rank)] = connection
        else:
            connection.close()
    return connections


def _call(port: int, secret: str) -> socket.socket:
    """A connection to the main process, which lives where the process group met."""
    address = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_S)
    except OSError as error:
        raise RuntimeError(f"the main process is not reached at {address}, port {port}: {error}") from error
    connection.settimeout(5)
    connection.sendall(f"{secret} {distributed.rank()}\n".encode())
    return connection


def _first_line(connection: socket.socket) -> str:
    """Up to a line feed and not beyond it."""
    line = b""
    while len(line) < 100 and (byte := connection.recv(1)) not in (b"", b"\n"):
        line += byte
    return line.decode("ascii", "replace")


def _mind_silence(connection: socket.socket) -> None:
    """Let the kernel ask the other machine for a sign of life, and close the connection without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    asking = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": (SILENCE_S - 10) // 5}
    for name, value in (asking | {"TCP_USER_TIMEOUT": 1000 * SILENCE_S}).items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
