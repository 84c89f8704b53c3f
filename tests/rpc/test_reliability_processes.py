"""Processes that are killed or told to stop, under load: who is told, how soon, and what is left."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from protocols import Ask, Http, Native, Outcome, Speaker, Vllm, speakers
from running_time import RunningTime
from serving import PATIENCE, ROOT, ServerProcess, server_process
from simulated import exact

from jaxserve.request_errors import EngineUnavailable
from rpc.client import AsyncClient
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


HANGS = """
from jaxserve.engine import Engine
def engine_factory():
    return Engine(simulated_step_ms=3_600_000.0, slots=32, max_context=2048, core="process", watchdog_seconds=1.0)
"""
"""A step takes an hour."""

MODEL = "smollm2-135m"


class Streams:
    """Eight streams of each protocol, all of which have begun, or, where none can, wait."""

    def __init__(self, clients: tuple[Native, Vllm, Http], max_tokens: int):
        self.asks: list[Ask] = []
        self.seen: set[int] = set()
        self.tasks: list[asyncio.Task[Outcome]] = []
        for number, speaker in enumerate([*clients] * 8):
            note = lambda count, number=number: self.seen.add(number) if count else None  # noqa: E731
            self.asks.append(Ask(3 + number, max_tokens, on_token=note))
            self.tasks.append(asyncio.create_task(speaker.run(self.asks[-1])))

    async def begun(self) -> None:
        while len(self.seen) < len(self.tasks):
            assert not any(task.done() for task in self.tasks)
            await asyncio.sleep(0.01)

    async def outcomes(self) -> list[tuple[Ask, Outcome]]:
        return list(zip(self.asks, await asyncio.gather(*self.tasks), strict=True))


def is_beginning(ask: Ask, outcome: Outcome) -> bool:
    """Whether its tokens are the first of those that it should have got."""
    cut = Ask(ask.prompt_tokens, len(outcome.token_ids))
    return Outcome(token_ids=outcome.token_ids, reasons=["length"]).is_exact(cut)


async def turned(clients: tuple[Native, Vllm, Http], clock: RunningTime) -> float:
    """When the health of every protocol says that nothing is taken."""
    for speaker in clients:
        while await speaker.is_serving():
            await asyncio.sleep(0.002)
    return clock.seconds


async def test_when_the_core_is_killed_streams_of_every_protocol_fail_and_all_health_turns_within_1_s() -> None:
    with server_process(SIMULATED, http=True) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with speakers(server.address, server.http_address, MODEL) as clients:
            streams = Streams(clients, 250)
            await streams.begun()
            os.kill(core_of(server), signal.SIGKILL)
            killed = clock.seconds
            outcomes = await streams.outcomes()
            assert await turned(clients, clock) - killed <= 1.0
            for ask, outcome in outcomes:
                assert outcome.code == "INTERNAL" and is_beginning(ask, outcome), outcome
            for speaker in clients:
                assert (await speaker.run(Ask())).code == "UNAVAILABLE"
            assert server.process.poll() is None


async def test_a_core_that_is_frozen_blocks_no_probe_and_is_unready_within_the_watchdogs_time_and_1_s() -> None:
    setup = SIMULATED.replace('core="process"', 'core="process", watchdog_seconds=1.5')
    with server_process(setup, http=True) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with (
            speakers(server.address, server.http_address, MODEL) as clients,
            speakers(server.address, server.http_address, MODEL) as probing,
        ):
            streams = Streams(clients, 250)
            await streams.begun()
            core = core_of(server)
            os.kill(core, signal.SIGSTOP)
            stopped = clock.seconds
            # More than the socket to the core holds.
            flood = [asyncio.create_task(clients[0].run(Ask(2000, 3))) for _ in range(300)]
            slowest = 0.0
            while await probing[0].is_serving() or await probing[2].is_serving():
                began = clock.seconds
                await probing[0].is_serving()
                slowest = max(slowest, clock.seconds - began)
                assert clock.seconds - stopped <= 1.5 + 1.0
                await asyncio.sleep(0.02)
            assert slowest <= 1.0, "probes answer all the while"
            os.kill(core, signal.SIGCONT)
            for ask, outcome in await streams.outcomes():
                assert outcome.is_exact(ask), outcome
            codes = {(await task).code for task in flood}
            assert codes <= {"OK", "UNAVAILABLE"}
            while not await probing[1].is_serving():
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("setup", [SIMULATED, HANGS], ids=["moves", "hangs"])
async def test_when_the_front_is_killed_no_orphan_is_left_after_2_s(setup: str) -> None:
    with server_process(setup) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with AsyncClient(server.address) as client:
            tasks = [asyncio.create_task(exact(client, 3 + number, 250)) for number in range(16)]
            while (await client.loads()).open_calls < 16:
                await asyncio.sleep(0.01)
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


async def test_sigterm_by_every_protocol_turns_health_first_and_within_100_ms_and_exits_0_within_the_grace() -> None:
    with server_process(SIMULATED, grace=60.0, http=True) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with (
            speakers(server.address, server.http_address, MODEL) as clients,
            speakers(server.address, server.http_address, MODEL) as late,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            jetstream = orchestrator_pb2_grpc.OrchestratorStub(channel)
            watch = clients[0].health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            streams = Streams(clients, 200)
            await streams.begun()
            for speaker in late:
                assert await speaker.is_serving()  # they are connected
            assert (await jetstream.HealthCheck(orchestrator_pb2.HealthCheckRequest())).is_live
            for pid in process_tree(server.process.pid):  # as a service manager does
                os.kill(pid, signal.SIGTERM)
            signalled = clock.seconds

            async def refused(speaker: Speaker) -> None:
                """No request is refused before health has turned, and none is taken after."""
                while (outcome := await speaker.run(Ask(max_tokens=1))).code == "OK":
                    pass
                assert not await late[0].is_serving() and not await late[2].is_serving()
                assert (outcome.code, outcome.started) == ("UNAVAILABLE", False), outcome
                assert "draining" in outcome.message
                if speaker is late[2]:
                    assert outcome.retry_after
                    async with late[2].client.get("/health") as health:
                        assert (health.status, await health.json()) == (503, {"status": "draining"})

            told, took, *_ = await asyncio.gather(watch.read(), turned(clients, clock), *map(refused, late))
            assert told.status == NOT_SERVING
            assert took - signalled <= 0.1
            assert not (await jetstream.HealthCheck(orchestrator_pb2.HealthCheckRequest())).is_live
            text = orchestrator_pb2.DecodeRequest.TextContent(text="late")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await jetstream.Decode(orchestrator_pb2.DecodeRequest(text_content=text, max_tokens=1)).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert not any(task.done() for task in streams.tasks)
            for ask, outcome in await streams.outcomes():
                assert outcome.is_exact(ask), outcome
            watch.cancel()
        assert await asyncio.to_thread(server.exit_code) == 0
        assert clock.seconds - signalled <= 60.0


@pytest.mark.parametrize("setup", [SIMULATED, HANGS], ids=["moves", "hangs"])
async def test_past_the_drain_limit_every_protocol_is_told_and_the_exit_code_is_3(setup: str) -> None:
    """Also where the core hangs, which nothing but its end stops."""
    with server_process(setup, grace=0.3, http=True) as server, RunningTime() as clock:
        await asyncio.to_thread(server.report, "ready")
        async with speakers(server.address, server.http_address, MODEL) as clients:
            streams = Streams(clients, 2000)
            if setup is HANGS:
                await turned(clients, clock)
            else:
                await streams.begun()
            server.signal(signal.SIGTERM)
            signalled = clock.seconds
            for ask, outcome in await streams.outcomes():
                assert outcome.code == "UNAVAILABLE" and is_beginning(ask, outcome), outcome
                assert "stopped before" in outcome.message
        assert await asyncio.to_thread(server.exit_code) == 3
        assert clock.seconds - signalled <= 0.3 + 10.0
