"""Control, health and reflection of a running server."""

import asyncio
import dataclasses
import threading

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from raw_http2 import SHUT_HELLO, call_headers, data_frames, headers_frame, message, raw_connection
from scripted_engine import ScriptedEngine
from serving import PATIENCE, eventually, serving

from jaxserve.front.loads import EngineLoads
from jaxserve.request_errors import EngineUnavailable, InvalidRequest
from rpc.client import AsyncClient
from rpc.lifecycle import State
from rpc.server import SERVICES, Server
from rpc.server_config import ServerConfig

pytestmark = pytest.mark.asyncio

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(client: AsyncClient) -> set[int]:
    """The statuses of the server and of each service."""
    names = ("", *SERVICES)
    answers = [await client._check(health_pb2.HealthCheckRequest(service=name)) for name in names]
    return {answer.status for answer in answers}


async def test_tokenize_and_detokenize() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        assert await client.tokenize("häh") == list("häh".encode())
        assert await client.tokenize([{"role": "user", "content": "a"}]) == list(b"<user>a")
        assert await client.detokenize(list("häh".encode())) == "häh"
        assert await client.tokenize("") == []
        for call, field in (
            (client.detokenize([256]), "token_ids"),
            (client.detokenize([-1]), "token_ids"),
            (client.tokenize([{"role": "nobody", "content": "a"}]), "messages"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await call
            assert caught.value.field == field


async def test_model_info_says_what_a_client_needs_to_know() -> None:
    async with serving(ScriptedEngine(max_context=128)) as (_, client):
        info = await client.model_info()
    assert (info.model, info.family, info.vocab_size, info.max_context) == ("scripted", "scripted", 256, 128)
    assert list(info.eos_ids) == [0]
    assert not info.HasField("bos_id")


async def test_server_info_says_state_device_and_limits() -> None:
    async with serving(ScriptedEngine(slots=3, max_waiting=5)) as (server, client):
        info = await client.server_info()
        assert info.state == "ready"
        assert info.uptime > 0
        assert (info.device.platform, info.device.kind) == ("cpu", "script")
        assert info.device.jax_version
        assert (info.limits.slots, info.limits.max_waiting) == (3, 5)
        assert info.limits.max_request_bytes == server.config.max_request_bytes
        kept = (info.limits.max_resumable_streams, info.limits.max_resumable_bytes, info.limits.resumable_seconds)
        assert kept == (256, 64 << 20, 60.0)


async def test_loads_count_what_runs_and_waits() -> None:
    engine = ScriptedEngine(slots=2)
    async with serving(engine) as (_, client):
        before = await client.loads()
        assert (before.running, before.waiting, before.available_pages) == (0, 0, before.total_pages)
        tasks = [asyncio.ensure_future(client.generate("hello").text()) for _ in range(5)]
        await eventually(lambda: engine.loads().running == 2)
        during = await client.loads()
        assert (during.running, during.waiting, during.open_calls) == (2, 3, 5)
        assert during.available_pages < during.total_pages
        for task in tasks:
            task.cancel()
        await eventually(lambda: engine.loads().running + engine.loads().waiting == 0)


async def test_whatever_the_engine_counts_is_told_by_the_same_name() -> None:
    engine = ScriptedEngine()
    counts = {field.name: 100 + number for number, field in enumerate(dataclasses.fields(EngineLoads))}
    async with serving(engine) as (_, client):
        engine.loads = lambda: EngineLoads(**counts)
        told = await client.loads()
    del counts["restarting"]  # health tells
    assert {name: getattr(told, name) for name in counts} == counts
    assert told.free_pages == counts["available_pages"] - counts["cached_pages"]


async def test_while_the_engine_loads_the_port_answers_not_serving() -> None:
    may_load = threading.Event()

    def engine_factory() -> ScriptedEngine:
        may_load.wait()
        return ScriptedEngine()

    server = Server(ServerConfig(grpc_port=0), report=lambda _: None)
    await server.start()
    loading = asyncio.ensure_future(server.load(engine_factory))
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            assert await health_of(client) == {NOT_SERVING}
            info = await client.server_info()
            assert info.state == "loading"
            assert not info.HasField("device")
            for call in (client.generate("a").text(), client.generate_once("a"), client.loads(), client.model_info()):
                with pytest.raises(EngineUnavailable, match="loading"):
                    await call
            assert not await client.abort("nobody")
            with pytest.raises(TimeoutError, match=f"the server at {client.address} was not ready after 0.1 s"):
                await client.wait_until_ready(timeout=0.1)
            waiting = asyncio.ensure_future(client.wait_until_ready())
            may_load.set()
            await waiting
            assert await health_of(client) == {SERVING}
            assert await client.generate("a", max_tokens=2).text() == "ab"
    finally:
        may_load.set()
        await loading
        await server.stop()


async def test_health_follows_the_engine_down_and_up() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (server, client):
        assert await health_of(client) == {SERVING}
        engine.is_healthy = False
        await eventually(lambda: server.lifecycle.state == "unhealthy")
        assert await health_of(client) == {NOT_SERVING}
        with pytest.raises(EngineUnavailable):
            await client.generate("a").text()
        engine.is_healthy = True
        await eventually(lambda: server.lifecycle.state == "ready")
        assert await health_of(client) == {SERVING}


async def test_health_of_an_unknown_service_is_not_found() -> None:
    async with serving(ScriptedEngine()) as (_, client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client._check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_of_all_services_is_listed() -> None:
    async with serving(ScriptedEngine()) as (server, client), grpc.aio.insecure_channel(client.address) as channel:
        listing = health_pb2_grpc.HealthStub(channel).List
        statuses = (await listing(health_pb2.HealthListRequest())).statuses
        assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(("", *SERVICES), SERVING)
        server.lifecycle.move_to(State.DRAINING)
        statuses = (await listing(health_pb2.HealthListRequest())).statuses
        assert {answer.status for answer in statuses.values()} == {NOT_SERVING}


async def test_a_health_watch_that_takes_nothing_holds_up_nobody() -> None:
    engine = ScriptedEngine()
    server = Server(ServerConfig(grpc_port=0), report=lambda _: None)
    await server.start()
    await server.attach(engine)
    address = f"127.0.0.1:{server.port}"
    async with AsyncClient(address) as client, raw_connection(address, SHUT_HELLO) as watch:
        await watch.write(headers_frame(1, call_headers("/grpc.health.v1.Health/Watch")) + data_frames(1, message(b"")))
        await eventually(lambda: 1 in watch.headers)
        engine.is_healthy = False
        await eventually(lambda: server.lifecycle.state == "unhealthy")
        assert await health_of(client) == {NOT_SERVING}
        assert await asyncio.wait_for(server.stop(grace=300.0), PATIENCE)


async def test_a_health_watch_sees_every_change_and_does_not_hold_the_server() -> None:
    server = Server(ServerConfig(grpc_port=0), report=lambda _: None)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        await server.attach(ScriptedEngine())
        assert (await watch.read()).status == SERVING
        stopping = asyncio.ensure_future(server.stop(grace=300.0))
        assert (await watch.read()).status == NOT_SERVING
        assert await asyncio.wait_for(stopping, 100.0)


async def test_reflection_lists_the_services_and_describes_them() -> None:
    async with (
        serving(ScriptedEngine()) as (server, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert names == {
            "jaxserve.v1.Inference",
            "jaxserve.v1.Control",
            "vllm.grpc.engine.VllmEngine",
            "jetstream_proto.Orchestrator",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        symbol = "jaxserve.v1.Inference"
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()


async def test_a_second_server_cannot_take_the_same_port() -> None:
    async with serving(ScriptedEngine()) as (server, _):
        second = Server(ServerConfig(grpc_port=server.port), report=lambda _: None)
        with pytest.raises(RuntimeError):
            await second.start()
