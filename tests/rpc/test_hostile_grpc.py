"""Reliability 16 to 18 over gRPC: what no client library would send, idle masses, and those who take their time."""

import asyncio
import gzip
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2
from latency import p99
from raw_http2 import (
    HELLO,
    PREFACE,
    SETTINGS_ACK,
    call_headers,
    data_frames,
    header_frames,
    headers_frame,
    message,
    raw_connection,
    reset_frame,
)
from running_time import forget_peak, peak_resident_bytes, resident_bytes
from scripted_engine import expected_ids
from serving import ServerProcess, back_to_the_start, eventually, lent, server_process, serving
from smg_grpc_proto.generated import vllm_engine_pb2
from test_refusals import detail

from rpc.client import AsyncClient
from rpc.v1 import jaxserve_pb2 as pb

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

GENERATE = "/jaxserve.v1.Inference/Generate"
VLLM = "/vllm.grpc.engine.VllmEngine/Generate"
SCRIPTED = "def engine_factory(): return ScriptedEngine(max_context=8192)"
REQUEST = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=3)).SerializeToString()
DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED = 4, 8


@asynccontextmanager
async def unharmed(setup: str = SCRIPTED, **fields: object) -> AsyncIterator[tuple[ServerProcess, AsyncClient]]:
    """A server in a process of its own, which serves on as if nothing had been when the test is through with it."""
    with server_process(setup, **fields) as server:
        await asyncio.to_thread(server.report, "ready")
        async with AsyncClient(server.address) as client:
            pages = (await client.loads()).total_pages
            yield server, client
            await canary(client)
            while (loads := await client.loads()).running + loads.waiting or loads.available_pages < pages:
                await asyncio.sleep(0.01)
        assert server.process.poll() is None


async def canary(client: AsyncClient) -> None:
    answer = await client.generate_once("hello", max_tokens=20)
    assert answer.token_ids == tuple(expected_ids(20))


def descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


# 16: hostile bytes

HEADERS = headers_frame(1, call_headers(GENERATE))
BOMB = gzip.compress(pb.GenerateRequest(text="0" * (64 << 20)).SerializeToString())
HOSTILE = {
    "a header of 1 MiB": header_frames(1, call_headers(GENERATE, ("x-huge", "y" * (1 << 20)))),
    "20,000 headers": header_frames(1, call_headers(GENERATE, *((f"x-{n}", "y" * 10) for n in range(20_000)))),
    "32 MiB of headers without an end": header_frames(1, 2000 * [("x-more", "y" * 16_000)], ends=False),
    "3 MB in chunks of one byte": HEADERS + data_frames(1, message(b"0" * (3 << 20)), size=1),
    "a gzip bomb": headers_frame(1, call_headers(GENERATE, ("grpc-encoding", "gzip")))
    + data_frames(1, message(BOMB, compressed=True)),
}


async def test_hostile_headers_and_messages_are_refused_and_cost_no_memory() -> None:
    async with unharmed() as (server, client):
        for _ in range(30):
            await client.generate_once("a" * 4000, max_tokens=1)
        before = resident_bytes(server.process.pid)
        for what, data in HOSTILE.items():
            forget_peak(server.process.pid)
            async with raw_connection(server.address) as connection:
                await connection.write(data)
                await eventually(lambda: connection.status(1) is not None or connection.closed.is_set())
                assert connection.status(1) == RESOURCE_EXHAUSTED, what
            assert peak_resident_bytes(server.process.pid) - before <= 4 << 20, what
            await canary(client)


DEEP = {
    "json_schema": lambda depth: '{"items":' * depth + "{}" + "}" * depth,
    "regex": lambda depth: "(" * depth + "a" + ")" * depth,
    "grammar": lambda depth: "start: " + "(" * depth + '"a"' + ")" * depth,
}
"""Constraints nested so deep."""


@pytest.mark.parametrize("kind", DEEP)
async def test_a_constraint_nested_deep_is_refused_by_name_and_costs_no_memory(kind: str, engine: "Engine") -> None:
    """A depth that is too long for a constraint, and the greatest that is not."""
    too_long = DEEP[kind](100_000)
    longest = DEEP[kind](engine.config.max_constraint_bytes * 100_000 // len(too_long) - 10)
    assert len(longest) <= engine.config.max_constraint_bytes < len(too_long)
    async with serving(lent(engine)) as (server, client), grpc.aio.insecure_channel(client.address) as channel:
        alone = await client.generate_once("hello", max_tokens=8, temperature=0.0, choice=("yes", "no"))
        assert engine._admission.constraints is not None
        checking = engine._admission.constraints._process.process
        assert checking is not None
        processes = ("self", checking.pid)
        before = [resident_bytes(process) for process in processes]
        for text, why in ((too_long, "bytes (limit"), (longest, "nested")):
            vllm = vllm_engine_pb2.SamplingParams(**{kind: text})  # pyright: ignore[reportArgumentType]
            for method, part, request in (
                (GENERATE, "constraint", pb.GenerateRequest(text="hello", constraint=pb.Constraint(**{kind: text}))),
                (VLLM, "sampling_params", vllm_engine_pb2.GenerateRequest(text="hello", sampling_params=vllm)),
            ):
                for process in processes:
                    forget_peak(process)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_stream(method)(request.SerializeToString()).read()
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                (violation,) = detail(refused.value, error_details_pb2.BadRequest).field_violations
                assert violation.field == f"{part}.{kind}" and why in violation.description
                for process, memory in zip(processes, before, strict=True):
                    assert peak_resident_bytes(process) - memory <= 16 << 20, process
        answer = await client.generate_once("hello", max_tokens=8, temperature=0.0, choice=("yes", "no"))
        assert answer.token_ids == alone.token_ids and answer.text in ("yes", "no")
        assert checking.poll() is None, "it was not ended by a limit"
        await back_to_the_start(engine, server)


# 17: idle connections


def idle_connection(address: str) -> socket.socket:
    """One that has shaken hands and is left alone."""
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(HELLO)
    connection.recv(9, socket.MSG_WAITALL)
    connection.sendall(SETTINGS_ACK)
    return connection


async def test_idle_connections_slow_nobody_and_one_over_the_cap_is_refused(pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("connections")
    async with unharmed(max_connections=count + 1) as (server, client):

        async def ask() -> None:
            await client.generate_once("hello", max_tokens=1)

        for _ in range(20):
            await ask()
        alone, before = await p99(ask), descriptors(server)
        with ExitStack() as closing:
            for number in range(count):
                closing.enter_context(idle_connection(server.address))
                if number % 100 == 0:
                    await asyncio.sleep(0)
            assert descriptors(server) - before >= count
            async with raw_connection(server.address, hello=PREFACE) as one_more:
                await asyncio.wait_for(one_more.closed.wait(), 60)
                assert not one_more.frames
            assert await p99(ask) <= 2 * alone
        await eventually(lambda: descriptors(server) <= before)
        async with raw_connection(server.address) as again:
            assert again.frames and not again.closed.is_set()


# 18: those who take their time, and those who take all back

SLOW = {
    "says nothing": b"",
    "says half of hello": PREFACE[:10],
    "sends no settings": PREFACE,
    "sends a part of its headers": HELLO + SETTINGS_ACK + header_frames(1, call_headers(GENERATE), ends=False),
    "sends a part of a frame": HELLO + SETTINGS_ACK + HEADERS[:20],
}


async def test_those_who_take_their_time_are_closed_and_hold_up_nobody() -> None:
    limits = {"handshake_timeout": 1.0, "message_timeout": 1.0, "keepalive_interval": 1.0, "keepalive_timeout": 1.0}
    async with unharmed(**limits) as (server, client), raw_connection(server.address) as dawdling:

        async def is_closed(what: str, data: bytes) -> None:
            async with raw_connection(server.address, data, acknowledges=False) as connection:
                await asyncio.wait_for(connection.closed.wait(), 60)

        async def trickle() -> None:
            for byte in message(b"0" * 1000):
                await dawdling.write(data_frames(1, bytes([byte])))
                await asyncio.sleep(0.1)

        await dawdling.write(HEADERS)
        trickling = asyncio.create_task(trickle())
        waiting = [asyncio.create_task(is_closed(*case)) for case in SLOW.items()]
        await canary(client)
        await eventually(lambda: dawdling.status(1) is not None)
        assert dawdling.status(1) == DEADLINE_EXCEEDED
        trickling.cancel()
        await asyncio.gather(*waiting)


@pytest.mark.parametrize("has_message", [True, False])
async def test_a_connection_of_50_000_rapid_resets_is_closed_and_others_go_on(has_message: bool) -> None:
    one = headers_frame(1, call_headers(GENERATE))
    if has_message:
        one += data_frames(1, message(REQUEST))
    one += reset_frame(1)
    first = (1).to_bytes(4, "big")
    async with unharmed() as (server, client), raw_connection(server.address) as connection:
        with_it = descriptors(server)

        async def survive() -> None:
            while not connection.closed.is_set():
                await canary(client)

        surviving = asyncio.create_task(survive())
        for start in range(0, 50_000, 100):
            streams = range(start, start + 100)
            await connection.write(b"".join(one.replace(first, (2 * n + 1).to_bytes(4, "big")) for n in streams))
        await eventually(connection.closed.is_set)
        await surviving
        await eventually(lambda: descriptors(server) < with_it)
