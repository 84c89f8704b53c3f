"""The entry of an engine's own process: `python -m jaxserve.core.process FD`, started by `CoreProcess`."""

import json
import os
import signal
import socket
import sys
import threading
import time

from jaxserve.config import EngineConfig
from jaxserve.core import garbage_collection
from jaxserve.core.channel import MessageSocket
from jaxserve.core.client import start_threads
from jaxserve.core.messages import Failed, Ready, Shutdown, decode, encode
from jaxserve.core.priority import give_way
from jaxserve.device.devices import GPU_MEMORY_FRACTION
from jaxserve.heap import share_one_arena
from jaxserve.log import configure_logging

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that wants the GIL gets it."""

ORPHAN_SECONDS = 1.0
"""Seconds in which a core without a front may end in good order."""


def main() -> int:
    """Runs a core, or the replicas of one, until the other end says Shutdown or goes away."""
    share_one_arena()
    # A terminal interrupts, and a service manager ends, every process of a server; the front decides when to stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    # What JAX's allocator takes of a GPU; JAX reads it when it first looks for one, and has no other setting for it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    # The step loop shares this process with two small threads, and must not wait 5 ms for either to give up the GIL.
    sys.setswitchinterval(SWITCH_INTERVAL)
    connection = MessageSocket(socket.socket(fileno=int(sys.argv[1])))
    config = EngineConfig.from_json(json.loads(connection.recv_bytes()))
    core = start_threads(config)
    failed = False

    def receive_all() -> None:
        while True:
            try:
                core.send(decode(connection.recv_bytes()))
            except (EOFError, ConnectionResetError):
                # The front is gone. Whatever this process does, loads or hangs in, nobody waits for it.
                core.send(Shutdown())
                time.sleep(ORPHAN_SECONDS)
                os._exit(1)

    threading.Thread(target=receive_all, name="jaxserve-core-receive", daemon=True).start()
    while (message := core.receive()) is not None:
        if isinstance(message, Ready):
            garbage_collection.quieten()
            if message.platform == "cpu":
                give_way()
        failed = failed or isinstance(message, Failed)
        try:
            connection.send_bytes(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)  # the front is gone, and with it every reader
    core.join()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
