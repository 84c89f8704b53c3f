"""Processes that are killed or told to stop, under load: who is told, how soon, and what is left."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running_time import RunningTime
from serving import PATIENCE, ROOT, ServerProcess, server_process
from simulated import exact
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from jaxserve.events import FinishReason
from jaxserve.request_errors import EngineUnavailable
from rpc.client import AsyncClient
from rpc.errors import RpcFailed
from rpc.jetstream import orchestrator_pb2, orchestrator_pb2_grpc

sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks.machine import process_tree

pytestmark = pytest.mark.asyncio

SIMULATED = """
from jaxserve.engine import Engine
def engine_factory():
    return Engine(simulated_step_ms=20.0, slots=32, max_context=2048, core="process")
"""
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def core_of(server: ServerProcess) -> int:
    """The process of the engine's core."""
    (core,) = [
        pid
        for pid in process_tree(server.process.pid)
        if b"jaxserve.core.process" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    return core


async def streams(client: AsyncClient, count: int) -> list[asyncio.Task[None]]:
    """Long streams, all of which have begun."""
    tasks = [asyncio.create_task(exact(client, 3 + number, 250)) for number in range(count)]
    while (await client.loads()).running < count:
        await asyncio.sleep(0.01)
    return tasks


async def test_when_the_core_is_killed_streams_fail_and_health_says_so_within_1_s() -> None:
    with server_process(SIMULATED) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with AsyncClient(server.address) as client, grpc.aio.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            tasks = await streams(client, 16)
            os.kill(core_of(server), signal.SIGKILL)
            killed = clock.seconds
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert (await watch.read()).status == NOT_SERVING
            assert clock.seconds - killed <= 1.0
            for result in results:
                assert isinstance(result, RpcFailed) and result.code is grpc.StatusCode.INTERNAL, result
            with pytest.raises(EngineUnavailable):
                await client.generate_once("late")
            assert server.process.poll() is None
            assert (await client.server_info()).state == "unhealthy"


async def test_when_the_front_is_killed_no_orphan_is_left_after_2_s() -> None:
    with server_process(SIMULATED) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with AsyncClient(server.address) as client:
            tasks = await streams(client, 16)
            tree = process_tree(server.process.pid)
            assert len(tree) > 1 and all(is_running(pid) for pid in tree)
            server.process.kill()
            killed = clock.seconds
            deadline = time.monotonic() + PATIENCE
            while any(is_running(pid) for pid in tree):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert clock.seconds - killed <= 2.0
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineUnavailable), result


async def test_sigterm_flips_health_first_finishes_what_runs_refuses_the_new_and_exits_0() -> None:
    with server_process(SIMULATED, grace=60.0) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with AsyncClient(server.address) as client, grpc.aio.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            tasks = await streams(client, 16)
            server.signal(signal.SIGTERM)
            signalled = clock.seconds
            assert (await watch.read()).status == NOT_SERVING
            assert clock.seconds - signalled <= 0.1
            assert not any(task.done() for task in tasks)
            with pytest.raises(EngineUnavailable, match="draining"):
                await client.generate_once("late")
            orchestrator = orchestrator_pb2_grpc.OrchestratorStub(channel)
            vllm = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            text = orchestrator_pb2.DecodeRequest.TextContent(text="late")
            late = [
                orchestrator.Decode(orchestrator_pb2.DecodeRequest(text_content=text, max_tokens=1)),
                vllm.Generate(vllm_engine_pb2.GenerateRequest(text="late")),
            ]
            for call in late:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert not (await orchestrator.HealthCheck(orchestrator_pb2.HealthCheckRequest())).is_live
            assert not (await vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest())).healthy
            await asyncio.gather(*tasks)  # each of its tokens is checked
        assert await asyncio.to_thread(server.exit_code) == 0


async def test_past_the_drain_limit_what_is_left_is_aborted_and_the_exit_code_is_3() -> None:
    with server_process(SIMULATED, grace=0.2) as server:
        await asyncio.to_thread(server.report, "ready")
        async with AsyncClient(server.address) as client:
            generation = client.generate("hello", ignore_eos=True)
            events = generation.events()
            await anext(events)
            server.signal(signal.SIGTERM)
            with pytest.raises(EngineUnavailable, match="stopped before"):
                async for _ in events:
                    pass
            assert generation.finished is not None
            assert generation.finished.finish_reason is FinishReason.ABORT
        assert await asyncio.to_thread(server.exit_code) == 3
