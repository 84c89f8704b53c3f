"""The entry of an engine's own process: `python -m jaxserve.core_process FD`, started by `CoreProcess`."""

import json
import os
import signal
import socket
import sys
import threading

from jaxserve import garbage_collection
from jaxserve.config import EngineConfig
from jaxserve.core import build_step_loop
from jaxserve.core_channel import MessageSocket, Outbox
from jaxserve.core_messages import Failed, Shutdown, decode, encode
from jaxserve.log import configure_logging

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that wants the GIL gets it."""


def main() -> int:
    """Runs a core until the other end says Shutdown or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides when to stop
    configure_logging()
    # The step loop shares this process with two small threads, and must not wait 5 ms for either to give up the GIL.
    sys.setswitchinterval(SWITCH_INTERVAL)
    connection = MessageSocket(socket.socket(fileno=int(sys.argv[1])))
    config = EngineConfig.from_json(json.loads(connection.recv_bytes()))
    outbox = Outbox(config.publish_ahead)

    def send_all() -> None:
        while (message := outbox.get()) is not None:
            try:
                connection.send_bytes(encode(message))
            except (BrokenPipeError, ConnectionResetError):
                os._exit(1)  # the front is gone, and with it every reader

    sender = threading.Thread(target=send_all, name="jaxserve-core-send")
    sender.start()
    try:
        loop = build_step_loop(config, outbox.put)
    except Exception as error:
        outbox.put(Failed(str(error) or type(error).__name__))
        outbox.close()
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
    garbage_collection.quieten()
    outbox.put(loop.ready)
    loop.run()
    outbox.close()
    sender.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
