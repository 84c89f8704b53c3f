"""uvicorn on the event loop that the gRPC server has, which owns the signals."""

import asyncio
import logging
import socket
import time

import uvicorn
from starlette.types import ASGIApp

from rpc.http.protocol import BoundedProtocol
from rpc.lifecycle import PortUnavailable
from rpc.security.tls import TlsFiles

KEEP_ALIVE = 75.0
"""Seconds that a connection may stay without a request; above the 60 s after which proxies reuse none."""
FLUSH_TIME = 0.5
"""Seconds that responses may take to end when the listener stops; what they answer has ended before."""


class HttpListener:
    """Listens for HTTP/1.1 from `start` to `stop`."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: TlsFiles | None = None):
        """`port`: 0 takes a free one. `tls`: None is plain text."""
        self._host = host
        self.port = port
        self._tls = tls
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=round(KEEP_ALIVE),
                timeout_graceful_shutdown=1,
            )
        )
        self._ticking: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    async def start(self) -> None:
        """Binds the port and answers. Raises PortUnavailable where the port cannot be had."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listening = socket.create_server((self._host, self.port), family=family, backlog=1024)
        except OSError as error:
            raise PortUnavailable(f"{self._host}:{self.port} cannot be had: {error.strerror or error}") from error
        self.port = listening.getsockname()[1]
        config = self._server.config
        config.load()
        config.ssl = None if self._tls is None else self._tls.ssl_context()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[listening])
        self._ticking = asyncio.create_task(self._server.main_loop())

    async def stop(self) -> None:
        """Closes the port and every connection. Idempotent."""
        if self._ticking is None:
            return
        ticking, self._ticking = self._ticking, None
        self._server.should_exit = True
        await ticking
        for server in self._server.servers:
            server.close()
        connections = self._server.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        deadline = time.monotonic() + FLUSH_TIME
        while connections and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(connections):
            assert isinstance(connection, BoundedProtocol)
            connection.transport.abort()  # its reader reads nothing
        await self._server.shutdown()
