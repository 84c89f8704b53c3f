"""What becomes of calls that bring no message that parses, and which of those that are taken back count as an attack."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from raw_http2 import call_headers, data_frames, headers_frame, message, raw_connection, reset_frame
from scripted_engine import ScriptedEngine
from serving import eventually, serving

from rpc import arrivals
from rpc.v1 import jaxserve_pb2 as pb

pytestmark = pytest.mark.asyncio

GENERATE = "/jaxserve.v1.Inference/Generate"
LONG = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=2000)).SerializeToString()
SHORT = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=1)).SerializeToString()


async def no_messages() -> AsyncIterator[bytes]:
    for nothing in ():
        yield nothing


@pytest.mark.parametrize("method", [GENERATE, "/jaxserve.v1.Control/GetLoads"])
async def test_a_call_that_ends_without_a_message_is_refused_and_not_left_waiting(method: str) -> None:
    async with serving(ScriptedEngine()) as (_, client):
        call = client._channel.stream_stream(method)(no_messages(), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError, match="ended without a message") as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "method",
    [
        GENERATE,
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_a_message_that_does_not_parse_is_refused_by_every_service(method: str) -> None:
    async with serving(ScriptedEngine()) as (_, client):
        with pytest.raises(grpc.aio.AioRpcError, match="malformed") as refused:
            await client._channel.unary_stream(method)(b"\xff").read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("timeout", ["900m", "60S"])
async def test_a_call_taken_back_at_its_deadline_is_not_premature(
    timeout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client whose deadline has passed resets the call, which is heard a little before the server's own clock."""
    monkeypatch.setattr(arrivals, "PREMATURE_CALLS", 1)
    monkeypatch.setattr(arrivals, "PREMATURE_SECONDS", 60.0)  # on a machine however busy
    async with (
        serving(ScriptedEngine(step_time=0.01)) as (server, client),
        raw_connection(client.address) as connection,
    ):
        headers = call_headers(GENERATE, ("grpc-timeout", timeout))
        await connection.write(headers_frame(1, headers) + data_frames(1, message(LONG)))
        await eventually(lambda: len(server.calls) > 0)
        await asyncio.sleep(0.6)
        await connection.write(reset_frame(1))
        await eventually(lambda: len(server.calls) == 0)
        if timeout == "60S":
            await eventually(connection.closed.is_set)
            return
        end = headers_frame(3, call_headers(GENERATE)) + data_frames(3, message(SHORT))
        await connection.write(end)
        await eventually(lambda: connection.status(3) == 0)
