"""Servers and processes for the tests: each on a free loopback port."""

import asyncio
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from rpc.client import AsyncClient
from rpc.served_engine import ServedEngine
from rpc.server import Server
from rpc.server_config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]

PATIENCE = 20.0
"""Seconds after which something that must happen has not; nothing is asserted to be fast by it."""


class _Lent:
    def __init__(self, engine: ServedEngine):
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def drain(self) -> None:
        pass

    def shutdown(self, grace: float = 0.0) -> bool:
        return True


def lent(engine: object) -> ServedEngine:
    """An engine that outlives its server: draining and stopping it is left to its owner."""
    return cast(ServedEngine, _Lent(cast(ServedEngine, engine)))


@asynccontextmanager
async def serving(
    engine: ServedEngine, config: ServerConfig | None = None
) -> AsyncIterator[tuple[Server, AsyncClient]]:
    """A server for the engine on this event loop, and a client connected to it."""
    # A pause of the whole machine, however long, is no client that has gone, or that takes its time.
    patient = ServerConfig(grpc_port=0, keepalive_timeout=3600.0, message_timeout=3600.0, stall_limit=3600.0)
    server = Server(config or patient, report=lambda _: None)
    await server.start()
    await server.attach(engine)
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield server, client
    finally:
        await server.stop(grace=0.0)


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits for a condition that must come true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


async def back_to_the_start(engine: ServedEngine, server: Server | None = None) -> None:
    """Waits until nothing runs or waits, every page is free or evictable, and the server has no call."""

    def idle() -> bool:
        loads = engine.loads()
        busy = loads.running + loads.waiting + (0 if server is None else len(server.calls))
        return busy == 0 and loads.available_pages == loads.total_pages

    await eventually(idle)


SERVER_SCRIPT = """
import sys, threading, time
sys.path.append({tests!r})
from rpc.serve import serve
from rpc.server_config import ServerConfig
from rpc.security.config import SecurityConfig
from scripted_engine import ScriptedEngine
{setup}
sys.exit(serve(engine_factory, {config!r}))
"""


class ServerProcess:
    """`serve` in a process of its own."""

    def __init__(self, setup: str, config: ServerConfig):
        script = SERVER_SCRIPT.format(setup=textwrap.dedent(setup), config=config, tests=str(ROOT / "tests/rpc"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.port = int(str(self.report("listening")["port"]))
        self.address = f"127.0.0.1:{self.port}"
        self.http_address = str(self.report("listening")["address"]) if config.http_port is not None else ""

    def report(self, event: str) -> dict[str, object]:
        """The next report, which must be this one."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        report = json.loads(line)
        assert report["event"] == event, report
        return report

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        return self.process.wait(timeout=PATIENCE)


@contextmanager
def server_process(setup: str, grace: float = 10.0, http: bool = False, **fields: object) -> Iterator[ServerProcess]:
    """Runs `serve` with the `engine_factory` that `setup` defines, and ends it whatever happens.

    `fields`: of the ServerConfig.
    """
    config = ServerConfig(grpc_port=0, grace=grace, http_port=0 if http else None)
    server = ServerProcess(setup, replace(config, **fields))
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
