"""uvicorn's HTTP/1.1 protocol with bounds that it lacks, on the head of a request and on the time it may take, and with
refusals that arrive though the request is not read to its end.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from rpc.http.lingering import LingeringTransport

MAX_HEAD_BYTES = 32 << 10
"""Of a request line and its headers together."""
MAX_PIPELINED = 8
"""Requests that wait for the one before them; past these nothing is read, and a client that leaves is not noticed."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, head_timeout: float, on_lost: Callable[[], None], **kwargs: Any):
        """Makes one connection's.

        Args:
            args, kwargs: of uvicorn's.
            head_timeout: seconds from a connection's beginning, or a head's first byte, until the head is complete.
            on_lost: called once the connection has ended.
        """
        super().__init__(*args, **kwargs)
        self._on_lost = on_lost
        self._head_timeout = head_timeout
        self._head_bytes = 0
        self._in_head = True
        self._in_message = False
        """Of the request that comes, or will not be read, some was read."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None
        """The request that is answered; `cycle` is the latest that has come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Starts the time of the first head."""
        self._lingering = LingeringTransport(transport, lambda: self._in_message)
        super().connection_made(self._lingering)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        self._stop_timer()
        self._lingering.stop()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Bounds what comes before a head is complete."""
        if self._lingering.is_lingering:
            self._lingering.drop(data)
            return
        self._in_message = True
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._await_head()
        self._feed(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431)

    def _feed(self, data: bytes) -> None:
        """Parses, as uvicorn does, but requests that ask for another protocol are answered as if they had not, which a
        server may do (RFC 9110, 7.8). The parser takes what follows such a head for that protocol; a new one reads the
        head once more without the wish, and then what follows."""
        pieces = [memoryview(data)]
        while pieces and not self.transport.is_closing():
            piece = pieces.pop()
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._asks_to_upgrade:
                    return
                pieces += [piece[upgrade.args[0] :], memoryview(self._head_without_upgrade())]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("Invalid HTTP request received.")

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *fields, b"", b""])

    @property
    def _asks_to_upgrade(self) -> bool:
        """The head that was parsed is read once more. CONNECT, which no route has, is an upgrade for the parser too."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def stalled(self, now: float) -> float:
        """Seconds for which the client has been seen to take nothing of what it is sent. `now`: any clock's."""
        return self._lingering.stalled(now)

    def on_message_begin(self) -> None:
        """A request has come so far. Nothing less is life of a connection that waits for one: the rest of a body that
        no route has read is not."""
        self._in_message = True
        self._unset_keepalive_if_required()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there in time, but may be too long all the same."""
        self._stop_timer()
        self._unset_keepalive_if_required()  # where the head began before the answer to the request before it ended
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse(431)
            return
        if self._asks_to_upgrade:
            return
        super().on_headers_complete()
        if 0 < len(self.pipeline) < MAX_PIPELINED:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Drops the body of a request that is refused by its head."""
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The next head begins."""
        if self._asks_to_upgrade:
            return
        self._in_head = True
        self._in_message = False
        self._head_bytes = 0
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout, self._on_late_head)

    def _on_late_head(self) -> None:
        self._head_timer = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self._refuse(408)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int) -> None:
        self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
