"""HTTP servers for the tests, and clients of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from openai import AsyncOpenAI

from rpc.served_engine import ServedEngine
from rpc.server import Server
from rpc.server_config import ServerConfig

PATIENCE = 60.0
"""Seconds after which something that must happen has not; nothing is asserted to be fast by it."""


@asynccontextmanager
async def http_serving(engine: ServedEngine, config: ServerConfig | None = None) -> AsyncIterator[tuple[Server, str]]:
    """A server for the engine on this event loop, and the address of its HTTP port, as "127.0.0.1:8000"."""
    server = Server(replace(config or ServerConfig(), grpc_port=0, http_port=0), report=lambda _: None)
    await server.start()
    await server.attach(engine)
    try:
        assert server.http is not None
        yield server, f"127.0.0.1:{server.http.port}"
    finally:
        await server.stop(grace=0.0)


@asynccontextmanager
async def openai_serving(engine: ServedEngine) -> AsyncIterator[tuple[Server, AsyncOpenAI]]:
    """The same, with the openai package's client, which tries only once."""
    async with http_serving(engine) as (server, address), openai_client(address) as client:
        yield server, client


def openai_client(address: str) -> AsyncOpenAI:
    """A client that tries only once."""
    return AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


@dataclass(frozen=True)
class RawAnswer:
    """What a server wrote on a connection until it closed it."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, object]:
        return json.loads(self.body)["error"]


def request_bytes(path: str, body: bytes, *headers: str) -> bytes:
    """A POST of JSON that asks for the connection to be closed after the answer."""
    lines = [f"POST {path} HTTP/1.1", "host: test", "content-type: application/json", "connection: close", *headers]
    lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def exchange(address: str, data: bytes) -> RawAnswer:
    """Writes bytes to the server and reads until it closes the connection, which must not be reset."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = bytearray()
    try:
        writer.write(data)
        async with asyncio.timeout(PATIENCE):
            while piece := await reader.read(1 << 16):
                answer += piece
    finally:
        writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return RawAnswer(int(status.split()[1]), headers, body)


async def post(address: str, path: str, body: object, *headers: str) -> RawAnswer:
    """Posts a value as JSON."""
    return await exchange(address, request_bytes(path, json.dumps(body).encode(), *headers))
