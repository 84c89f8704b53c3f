"""A server as the whole of a process: it loads, serves until a signal, and leaves in good order."""

import asyncio
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from enum import IntEnum

from rpc.event_loop import let_completions_gather, new_event_loop
from rpc.served_engine import ServedEngine
from rpc.server import Report, Server
from rpc.server_config import ServerConfig

logger = logging.getLogger(__name__)

OWN_DESCRIPTORS = 256
"""Open files that a server needs beside its connections, and more."""


class ExitCode(IntEnum):
    """What `serve` returns, for the process to exit with; `jaxserve.commands.start.ExitStatus` has the others."""

    DRAINED = 0
    """Every accepted request finished, or there was none."""
    ABORTED = 3
    """The grace passed, or a second signal came, and requests in flight were aborted."""


def print_report(report: dict[str, object]) -> None:
    """Writes one JSON line to standard output."""
    print(json.dumps(report), flush=True)


def take_descriptors(config: ServerConfig) -> None:
    """Lets the process have as many open files as its connections need, where it may: the usual limit, 1,024, is there
    for programs that use `select`. Past it no connection is taken, no process started and no key read."""
    ports = sum(port is not None for port in (config.grpc_port, config.http_port, config.metrics_port))
    needed = ports * config.max_connections + OWN_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    granted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    if granted < needed:
        logger.warning(
            "%d files may be open, and %d connections on %d ports need %d: raise the limit, or lower max_connections",
            granted,
            config.max_connections,
            ports,
            needed,
        )


def serve(engine_factory: Callable[[], ServedEngine], config: ServerConfig, report: Report = print_report) -> int:
    """Serves an engine until SIGTERM or SIGINT, and returns the exit code, an `ExitCode`.

    The port answers health checks NOT_SERVING while `engine_factory` runs in a thread. The first signal drains for up
    to `config.grace` seconds; a second one aborts what is left. A signal while the engine still loads ends the process
    from here with DRAINED, since native code that loads or compiles cannot be stopped.

    Raises:
        PortUnavailable: a port cannot be had.
        ValueError: the files of keys or TLS cannot be used.
        Exception: what `engine_factory` raises.
    """
    take_descriptors(config)
    code, loading = asyncio.run(_serve(engine_factory, config, report), loop_factory=new_event_loop)
    if loading:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


async def _serve(
    engine_factory: Callable[[], ServedEngine], config: ServerConfig, report: Report
) -> tuple[ExitCode, bool]:
    """Returns the exit code, and whether the engine was still loading."""
    server = Server(config, report)
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            server.hurry()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await server.start()
    let_completions_gather()
    loading = asyncio.create_task(server.load(engine_factory))
    asked = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((loading, asked), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await asked
        still_loading = not loading.done()
    finally:
        loading.cancel()
        asked.cancel()
        drained = await server.stop()
    code = ExitCode.DRAINED if drained else ExitCode.ABORTED
    report({"event": "stopped", "exit_code": int(code)})
    return code, still_loading
