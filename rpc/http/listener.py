"""uvicorn on the event loop that the gRPC server has, which owns the signals."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from rpc.http.protocol import BoundedProtocol
from rpc.lifecycle import PortUnavailable
from rpc.security.tls import TlsFiles
from rpc.server_config import ServerConfig

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75.0
"""Seconds that a connection may stay without a request; above the 60 s after which proxies reuse none."""
ACCEPT_PAUSE = 1.0
"""Seconds to wait where the system gives no further descriptor."""
SEND_BUFFER_BYTES = 32 << 10
"""Of the system's, for what a client has not taken; Linux doubles it. Left alone it grows to megabytes a connection, so
that a reader that reads nothing is noticed late."""
STALL_LOOKS = 8
"""At each connection within the stall limit; it is kept to an eighth."""
FLUSH_TIME = 0.5
"""Seconds that connections may take to close when the listener stops; what they answer has ended before."""


class HttpListener:
    """Listens for HTTP/1.1 from `start` to `stop`."""

    def __init__(self, app: ASGIApp, config: ServerConfig, port: int, tls: TlsFiles | None = None):
        """`config`: address and limits. `port`: 0 takes a free one. `tls`: None is plain text."""
        self._host = config.host
        self._config = config
        self.port = port
        self._tls = tls
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=partial(  # pyright: ignore[reportArgumentType]
                    BoundedProtocol, head_timeout=config.handshake_timeout, on_lost=self._on_lost
                ),
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
        self.connections = 0
        """How many are open."""
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Binds the port and answers. Raises PortUnavailable where the port cannot be had."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        both = self._host == "::" and socket.has_dualstack_ipv6()  # as gRPC does
        try:
            listening = socket.create_server((self._host, self.port), family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            raise PortUnavailable(f"{self._host}:{self.port} cannot be had: {error.strerror or error}") from error
        self.port = listening.getsockname()[1]
        config = self._server.config
        config.load()
        config.ssl = None if self._tls is None else self._tls.ssl_context()
        self._server.lifespan = config.lifespan_class(config)
        await self._server.startup(sockets=[])  # accepts nothing: uvicorn caps no connections
        listening.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(listening))
        self._watching = asyncio.create_task(self._watch())
        self._ticking = asyncio.create_task(self._server.main_loop())

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listening)
                except OSError as error:
                    logger.warning("no connection is accepted for %g s: %s", ACCEPT_PAUSE, error)
                    await asyncio.sleep(ACCEPT_PAUSE)
                    continue
                if self.connections >= self._config.max_connections:
                    connection.close()
                    continue
                self.connections += 1
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                handshake = asyncio.create_task(self._shake_hands(connection))
                self._handshakes.add(handshake)
                handshake.add_done_callback(self._handshakes.discard)
                await asyncio.sleep(0)  # a crowd at the door must not hold up those inside

    async def _shake_hands(self, connection: socket.socket) -> None:
        config, state = self._server.config, self._server.server_state
        make_protocol = partial(config.http_protocol_class, config=config, server_state=state, app_state={})
        timeout = None if config.ssl is None else self._config.handshake_timeout
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                make_protocol, connection, ssl=config.ssl, ssl_handshake_timeout=timeout
            )
        except (OSError, TimeoutError) as error:  # an SSLError is an OSError
            self._on_lost()  # the protocol was never told of it
            logger.debug("a connection was given up before its first request: %s", error)

    async def _watch(self) -> None:
        """Cuts off clients that take nothing of what they are sent, whatever it is: a stream would hold its pages, and
        a connection that closes would wait for ever."""
        limit = self._config.stall_limit
        while True:
            await asyncio.sleep(limit / STALL_LOOKS)
            now = time.monotonic()
            for connection in list(self._server.server_state.connections):
                assert isinstance(connection, BoundedProtocol)
                if connection.stalled(now) > limit:
                    logger.warning("a connection was cut off: its client read nothing for %g s", limit)
                    connection.transport.abort()

    def _on_lost(self) -> None:
        self.connections -= 1

    async def stop(self, is_patient: Callable[[], bool]) -> None:
        """Closes the port and every connection. Idempotent.

        Args:
            is_patient: whether clients that read still have time to take what they were sent.
        """
        if self._ticking is None or self._accepting is None or self._watching is None:
            return
        for task in (self._accepting, *self._handshakes):
            task.cancel()
        ticking, self._ticking = self._ticking, None
        self._server.should_exit = True
        await ticking
        connections = self._server.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        closed = time.monotonic() + FLUSH_TIME
        while connections and (
            time.monotonic() < closed
            or (is_patient() and any(one.transport.get_write_buffer_size() for one in connections))
        ):
            await asyncio.sleep(0.01)
        self._watching.cancel()
        for connection in list(connections):
            assert isinstance(connection, BoundedProtocol)
            connection.transport.abort()  # its reader reads nothing
        await self._server.shutdown()
