"""What the processes of a run tell each other beside its collectives, in the store that torch's process group met at.

A collective cannot tell that a process has failed while the others wait for it. So each process keeps its state in the
store under a key of its own, and reads the states of all.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from datetime import timedelta
from typing import Any

from mllm_keeplora.system import distributed

CONNECT_S = 60


class SharedStore:
    """Share the states of all processes of the open process group, which connect at the same time.

    The main process hosts torch's store, or its launcher does. This is a client of its own: torch's is busy for as
    long as a process waits for another one.

    Raises:
        RuntimeError: the store is not reached.
    """

    def __init__(self):
        from torch.distributed import PrefixStore, TCPStore

        told = distributed.gather((socket.gethostname(), secrets.token_hex(8)))
        self.hosts = [host for host, _ in told]
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=CONNECT_S)
        client = TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        self._store = PrefixStore(f"watch/{told[0][1]}", client)  # a launcher's store outlives a run that it restarts
        self._store.set(str(distributed.rank()), "{}")
        self._store.compare_set("failure", "", "null")
        self._keys = [*map(str, range(len(told))), "failure"]
        distributed.barrier()  # whoever reads a key would wait until it is there

    def exchange(self, state: dict[str, Any], failure: dict[str, Any] | None) -> list[Any]:
        """Write this process's state, and the run's failure unless there is one; return all states and the failure.

        Raises:
            RuntimeError: the store is gone.
        """
        if failure is not None:
            self._store.compare_set("failure", "null", json.dumps(failure))
        self._store.set(str(distributed.rank()), json.dumps(state))
        return [json.loads(text) for text in self._store.multi_get(self._keys)]
