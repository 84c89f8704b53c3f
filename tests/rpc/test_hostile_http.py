"""Reliability 17, 18 and 31 over HTTP: idle masses, those who take their time or leave, and no handshake, no request."""

import asyncio
import os
import socket
import ssl
import struct
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from certificates import Authority
from http_serving import http_serving, post, request_bytes
from latency import p99
from running_time import peak_resident_bytes
from scripted_engine import ScriptedEngine
from serving import back_to_the_start, eventually, server_process

from rpc.client import AsyncClient
from rpc.security.config import SecurityConfig
from rpc.server_config import ServerConfig

pytestmark = pytest.mark.asyncio

COMPLETIONS = "/v1/completions"
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n".encode()
ABORTING = struct.pack("ii", 1, 0)
"""A closed socket resets its connection."""


async def canary(address: str) -> None:
    answer = await post(address, COMPLETIONS, {"prompt": "x", "max_tokens": 5})
    assert answer.status == 200 and b'"abcde"' in answer.body


def connected(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)))


async def test_idle_connections_slow_nobody_and_one_over_the_cap_is_refused(pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("connections")
    setup = "def engine_factory(): return ScriptedEngine()"
    limits = {"max_connections": count + 1, "handshake_timeout": 600.0}
    with server_process(setup, http=True, **limits) as server:
        await asyncio.to_thread(server.report, "ready")
        address = server.http_address

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{server.process.pid}/fd"))

        async def ask() -> None:
            await canary(address)

        for _ in range(20):
            await ask()
        alone = await p99(ask)
        readings = []
        for _ in range(20):  # the last of those who asked may still be there
            readings.append(descriptors())
            await asyncio.sleep(0.01)
        before = min(readings)
        with ExitStack() as closing:
            for _ in range(count):
                closing.enter_context(connected(address))
            await eventually(lambda: descriptors() >= before + count)
            assert await p99(ask) <= 2 * alone
            closing.enter_context(connected(address))
            await eventually(lambda: descriptors() >= before + count + 1)
            with connected(address) as one_more:
                assert await asyncio.to_thread(one_more.recv, 1) == b""
        await eventually(lambda: descriptors() <= before)
        await canary(address)
        assert server.process.poll() is None


@pytest.mark.parametrize("tls", [False, True])
async def test_those_who_take_their_time_are_closed_and_hold_up_nobody(tls: bool, tmp_path: Path) -> None:
    security = Authority(tmp_path / "authority").server() if tls else SecurityConfig()
    config = ServerConfig(handshake_timeout=0.5, message_timeout=0.5, security=security)
    engine = ScriptedEngine()
    async with http_serving(engine, config) as (server, address):

        async def trickle(data: bytes, answers: bytes) -> None:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(data)
            ended = asyncio.create_task(reader.read())
            while not ended.done():
                writer.write(b"0")
                await asyncio.sleep(0.1)
            assert ended.exception() is not None or ended.result().startswith(answers)
            writer.close()

        silent, writing = await asyncio.open_connection(*address.split(":"))
        if tls:
            assert await asyncio.wait_for(silent.read(), 60) == b""
        else:
            slow = [trickle(HEAD, b"HTTP/1.1 408"), trickle(HEAD + b"content-length: 1000\r\n\r\n", b"HTTP/1.1 408")]
            await asyncio.gather(*slow, canary(address))
            assert (await asyncio.wait_for(silent.read(), 60)).startswith(b"HTTP/1.1 408")
        writing.close()
        await eventually(lambda: server.http is not None and not server.http.connections)
        await back_to_the_start(engine, server)


async def test_the_rest_of_a_body_that_was_answered_unread_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpc.http.listener.KEEP_ALIVE", 1.0)
    health, length = b"GET /health HTTP/1.1\r\nhost: test\r\n", b"content-length: 2\r\n\r\n"
    async with http_serving(ScriptedEngine()) as (server, address):

        async def answered(request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(request)
            assert await reader.readuntil(b'{"status":"ready"}')
            return reader, writer

        trickling, complete = await answered(health + length), await answered(health + length)
        again = await answered(health + length)
        trickling[1].write(b"0")
        complete[1].write(b"00")
        again[1].write(b"00" + health + b"\r\n")  # the rest, and a further request behind it
        assert await again[0].readuntil(b'{"status":"ready"}')
        for reader, writer in (trickling, complete, again):
            assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()
        await eventually(lambda: server.http is not None and not server.http.connections)


async def test_a_request_whose_head_began_while_the_one_before_was_answered_is_not_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rpc.http.listener.KEEP_ALIVE", 1.0)
    async with http_serving(ScriptedEngine(step_time=0.05)) as (_, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        quick, slow = (request_bytes(COMPLETIONS, b'{"prompt": "x", "max_tokens": %d}' % tokens) for tokens in (2, 30))
        writer.write(quick.replace(b"connection: close\r\n", b"") + slow[:20])
        await reader.readuntil(b'"cached_tokens": 0}}}')
        writer.write(slow[20:])
        assert b'"completion_tokens": 30' in await asyncio.wait_for(reader.read(), 60)
        writer.close()


def ask_and_leave(address: str, count: int) -> None:
    """So many connections at a time, each of which comes so far with a request, and is then reset."""
    asked = [
        b"",
        HEAD[:20],
        HEAD + b"content-length: 1000\r\n\r\n{",
        request_bytes(COMPLETIONS, b'{"prompt": "x"}'),
        request_bytes(COMPLETIONS, b'{"prompt": "x", "stream": true}'),
    ]
    with ExitStack() as closing:
        for number in range(count):
            leaving = closing.enter_context(connected(address))
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTING)
            leaving.sendall(asked[number % len(asked)])


async def test_clients_that_ask_and_leave_over_and_over_leave_nothing_and_hold_up_nobody(
    pytestconfig: pytest.Config,
) -> None:
    setup = "def engine_factory(): return ScriptedEngine(slots=64, max_waiting=4096)"
    with server_process(setup, http=True) as server:
        await asyncio.to_thread(server.report, "ready")
        address, pid = server.http_address, server.process.pid
        done = asyncio.Event()

        async def survive() -> None:
            while not done.is_set():
                await canary(address)

        await canary(address)
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        surviving = asyncio.create_task(survive())
        memory = 0
        for _ in range(pytestconfig.getoption("resets") // 1000):
            await asyncio.to_thread(ask_and_leave, address, 1000)
            memory = memory or peak_resident_bytes(pid)
        done.set()
        await surviving
        async with AsyncClient(server.address) as client:
            while (loads := await client.loads()).running + loads.waiting or loads.available_pages < loads.total_pages:
                await asyncio.sleep(0.01)
        # A thousand cost what they cost; the next thousand may come while they are still being closed.
        assert peak_resident_bytes(pid) - memory <= 32 << 20
        await eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= descriptors + 1)  # the client's
        await canary(address)
        assert server.process.poll() is None


def context(authority: Authority | None, shown: tuple[str, str] | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=None if authority is None else str(authority.certificate))
    if shown is not None:
        made.load_cert_chain(*shown)
    return made


async def shakes_hands(address: str, context: ssl.SSLContext) -> bool:
    """Whether a client of HTTPS gets an answer."""
    host, port = address.split(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
    except (ssl.SSLError, ConnectionError):
        return False
    try:
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
    except (ssl.SSLError, ConnectionError):
        return False  # in TLS 1.3 a client learns only then that its certificate was refused
    finally:
        writer.close()
    return answer.startswith(b"HTTP/1.1 200")


async def test_tls_lets_in_who_trusts_and_is_trusted_and_nobody_else(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "authority"), Authority(tmp_path / "other")
    expired = authority.issue("expired", lifetime=timedelta(days=-1))
    elsewhere = authority.issue("elsewhere", host="elsewhere.example")
    for cert, key in (expired, elsewhere):
        config = ServerConfig(security=SecurityConfig(tls_cert=cert, tls_key=key))
        async with http_serving(ScriptedEngine(), config) as (_, address):
            assert not await shakes_hands(address, context(authority))
    mutual = ServerConfig(security=authority.server(tls_client_ca=str(authority.certificate)))
    async with http_serving(ScriptedEngine(), mutual) as (_, address):
        shown = authority.issue("client")
        assert await shakes_hands(address, context(authority, shown))
        assert not await shakes_hands(address, context(other, shown))
        for bad in (None, other.issue("client"), expired):
            assert not await shakes_hands(address, context(authority, bad))
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n")
        assert not (await reader.read()).startswith(b"HTTP/")
        writer.close()
        assert await shakes_hands(address, context(authority, shown))
