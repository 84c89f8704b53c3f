"""HTTP/2 as no client library would speak it: frames are written as they are asked for."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)
from serving import eventually

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HELLO = PREFACE + SettingsFrame(0).serialize()
"""What a client begins with."""
SHUT_HELLO = PREFACE + SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0}).serialize()
"""What one begins with that takes no message of an answer."""

SETTINGS_ACK = SettingsFrame(0, flags=["ACK"]).serialize()
MAX_FRAME = 1 << 14
"""Bytes of the longest frame that a server takes unasked."""

Headers = Iterable[tuple[str, str]]


def call_headers(path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """The headers of a gRPC call."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    ]


def header_block(headers: Headers) -> bytes:
    """Headers as HPACK has them, without its dynamic table."""
    return Encoder().encode([(name, value, True) for name, value in headers], huffman=False)


def headers_frame(stream: int, headers: Headers, *flags: str) -> bytes:
    """Headers that fit a frame; END_HEADERS unless flags are given."""
    return HeadersFrame(stream, header_block(headers), flags=flags or ("END_HEADERS",)).serialize()


def header_frames(stream: int, headers: Headers, ends: bool = True) -> bytes:
    """Headers of any size, over frames of 16 KiB. `ends`: whether the last of them says that it is."""
    block = header_block(headers)
    pieces = [block[start : start + MAX_FRAME] for start in range(0, len(block), MAX_FRAME)]
    frames: list[Frame] = [HeadersFrame(stream, pieces[0])]
    frames += [ContinuationFrame(stream, piece) for piece in pieces[1:]]
    if ends:
        frames[-1].flags.add("END_HEADERS")
    return b"".join(frame.serialize() for frame in frames)


def data_frames(stream: int, data: bytes, size: int = MAX_FRAME) -> bytes:
    """Data in frames of so many bytes; nothing says that it ends."""
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    return b"".join(DataFrame(stream, piece).serialize() for piece in pieces)


def message(data: bytes, compressed: bool = False) -> bytes:
    """A gRPC message with its prefix."""
    return struct.pack(">BI", compressed, len(data)) + data


def reset_frame(stream: int) -> bytes:
    return RstStreamFrame(stream, error_code=8).serialize()


class RawConnection:
    """A connection, and every frame that came on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, acknowledges: bool):
        self.writer = writer
        self._acknowledges = acknowledges
        self._reader = reader
        self.frames: list[Frame] = []
        self.headers: dict[int, dict[str, str]] = {}
        """What came as headers and trailers, by stream."""
        self.closed = asyncio.Event()
        self._decoder = Decoder()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                frame, length = Frame.parse_frame_header(memoryview(await self._reader.readexactly(9)))
                frame.parse_body(memoryview(await self._reader.readexactly(length)))
                self.frames.append(frame)
                if isinstance(frame, HeadersFrame):
                    self.headers.setdefault(frame.stream_id, {}).update(self._decoder.decode(frame.data))
                if self._acknowledges:
                    self._acknowledge(frame)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed.set()
            self.writer.transport.abort()  # who waits to write need not

    def _acknowledge(self, frame: Frame) -> None:
        if "ACK" in frame.flags or self.writer.is_closing():
            return
        if isinstance(frame, SettingsFrame):
            self.writer.write(SETTINGS_ACK)
        elif isinstance(frame, PingFrame):
            self.writer.write(PingFrame(0, frame.opaque_data, flags=["ACK"]).serialize())

    async def write(self, data: bytes) -> None:
        """Writes, unless the connection has been closed."""
        if not self.closed.is_set():
            with contextlib.suppress(ConnectionError):
                self.writer.write(data)
                await self.writer.drain()

    def status(self, stream: int) -> int | None:
        """The gRPC status of a call; None before there is one."""
        status = self.headers.get(stream, {}).get("grpc-status")
        return None if status is None else int(status)

    async def close(self) -> None:
        self._reading.cancel()
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def raw_connection(address: str, hello: bytes = HELLO, acknowledges: bool = True) -> AsyncIterator[RawConnection]:
    """A connection that has said hello.

    `acknowledges`: answers settings and pings. Limits that a server sets hold once they are acknowledged.
    """
    host, port = address.split(":")
    connection = RawConnection(*await asyncio.open_connection(host, int(port)), acknowledges)
    try:
        await connection.write(hello)
        if hello == HELLO:
            await eventually(lambda: bool(connection.frames))
        yield connection
    finally:
        await connection.close()
