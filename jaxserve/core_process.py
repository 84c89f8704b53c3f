"""The entry of an engine's own process: `python -m jaxserve.core_process FD`, started by `CoreProcess`."""

import gc
import json
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

from jaxserve.config import EngineConfig
from jaxserve.core import build_step_loop
from jaxserve.core_messages import Failed, Message, Shutdown, decode, encode
from jaxserve.log import configure_logging


def main() -> int:
    """Runs a core until the other end says Shutdown or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides when to stop
    configure_logging()
    connection = Connection(int(sys.argv[1]))
    config = EngineConfig.from_json(json.loads(connection.recv_bytes()))
    outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def send_all() -> None:
        while (message := outgoing.get()) is not None:
            try:
                connection.send_bytes(encode(message))
            except (BrokenPipeError, ConnectionResetError):
                os._exit(1)  # the front is gone, and with it every reader

    sender = threading.Thread(target=send_all, name="jaxserve-core-send")
    sender.start()
    try:
        loop = build_step_loop(config, outgoing.put)
    except Exception as error:
        outgoing.put(Failed(str(error) or type(error).__name__))
        outgoing.put(None)
        sender.join()
        return 1

    def receive_all() -> None:
        while True:
            try:
                loop.commands.put(decode(connection.recv_bytes()))
            except (EOFError, ConnectionResetError):
                loop.commands.put(Shutdown())
                return

    threading.Thread(target=receive_all, name="jaxserve-core-receive", daemon=True).start()
    # What is there now stays: a full collection, which halts the loop, need not look at it again (70 ms otherwise).
    gc.collect()
    gc.freeze()
    outgoing.put(loop.ready)
    loop.run()
    outgoing.put(None)
    sender.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
