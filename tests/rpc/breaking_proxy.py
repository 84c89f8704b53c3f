"""A proxy whose connections break: on demand, or after a number of bytes."""

import asyncio
from collections.abc import Iterable, Iterator


class BreakingProxy:
    """Passes bytes on to a port of loopback until a connection breaks. Use as an async context manager.

    Args:
        there: the port that bytes are passed on to; may be changed.
        delay: seconds that bytes take.
        breaks: bytes, in both directions together, after which each connection breaks, in the order in which they
            come; those that come after the last one stay whole.
    """

    def __init__(self, there: int, breaks: Iterable[int] = (), delay: float = 0.0):
        self.there = there
        self.delay = delay
        self.broken = 0
        """Connections that broke after their bytes."""
        self._breaks: Iterator[int] = iter(breaks)
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "BreakingProxy":
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def be_silent(self) -> None:
        """Holds back all that comes from now on. From any thread."""
        self.delay = 3600.0

    def cut(self) -> None:
        """Breaks all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.there)
        except ConnectionError:
            writer.transport.abort()
            return
        self._writers.append(there_writer)
        link = _Link([writer, there_writer], next(self._breaks, None))
        self._pumps.append(asyncio.ensure_future(self._pump(link, reader, there_writer)))
        self._pumps.append(asyncio.ensure_future(self._pump(link, there_reader, writer)))

    async def _pump(self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay)
                writer.write(link.allowed(data))
                if link.left == 0:
                    self.broken += 1
                    link.left = None  # by the other pump it is not broken again
                    return
        except ConnectionError:
            pass  # broken
        finally:
            link.abort()


class _Link:
    """A connection and the bytes that may still pass; None where there is no bound."""

    def __init__(self, writers: list[asyncio.StreamWriter], left: int | None):
        self._writers = writers
        self.left = left

    def allowed(self, data: bytes) -> bytes:
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
        return data

    def abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
