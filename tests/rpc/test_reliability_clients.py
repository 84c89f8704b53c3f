"""Clients that die, sleep or dawdle: what they held comes back in time, and the others notice nothing."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from running_time import RunningTime, resident_bytes
from serving import ROOT, back_to_the_start, eventually, lent, serving
from simulated import exact

from rpc.server_config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio


@contextmanager
def clients(address: str, processes: int, streams: int, *window: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with so many open streams each, ended whatever happens."""
    command = [sys.executable, str(ROOT / "tests/rpc/many_streams.py"), address, str(streams), *window]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


async def all_open(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "open\n"


@pytest.mark.slow
async def test_500_streams_whose_clients_are_killed_return_their_pages_within_2_s(simulated: "Engine") -> None:
    async with serving(lent(simulated)) as (server, client):
        with clients(client.address, 5, 100) as started, RunningTime() as clock:
            await all_open(started)
            survivors = [asyncio.create_task(exact(client, 3 + number, 200)) for number in range(8)]
            await eventually(lambda: simulated.loads().running == 508)
            for process in started:
                process.kill()
            killed = clock.seconds
            await eventually(lambda: simulated.loads().running <= 8)
            assert clock.seconds - killed <= 2.0
            await asyncio.gather(*survivors)
        await back_to_the_start(simulated, server)
        await exact(client, 5, 20)


async def test_a_client_that_sleeps_is_cancelled_within_the_keepalive_times_and_1_s(simulated: "Engine") -> None:
    config = ServerConfig(grpc_port=0, keepalive_interval=1.0, keepalive_timeout=1.0)
    async with serving(lent(simulated), config) as (server, client):
        with clients(client.address, 1, 10) as started, RunningTime() as clock:
            await all_open(started)
            survivor = asyncio.create_task(exact(client, 4, 100))
            await eventually(lambda: simulated.loads().running == 11)
            started[0].send_signal(signal.SIGSTOP)  # its sockets stay open and take what fits
            stopped = clock.seconds
            await eventually(lambda: simulated.loads().running <= 1)
            assert clock.seconds - stopped <= 1.0 + 1.0 + 1.0
            await survivor
        await back_to_the_start(simulated, server)


@pytest.mark.slow
async def test_20_slow_readers_cost_little_memory_and_no_neighbour_and_end_at_the_stall_limit(
    simulated: "Engine",
) -> None:
    config = ServerConfig(grpc_port=0, stall_limit=4.0)
    async with serving(lent(simulated), config) as (server, client):
        with RunningTime() as clock:

            async def gaps() -> list[float]:
                """Between the messages of eight streams, in this process's running time."""
                found: list[float] = []

                async def follow(number: int) -> None:
                    last = None
                    request = {"token_ids": [300] * (3 + number), "max_tokens": 60, "ignore_eos": True}
                    async for _ in client.generate(request, return_text=False):
                        if last is not None:
                            found.append(clock.seconds - last)
                        last = clock.seconds

                await asyncio.gather(*map(follow, range(8)))
                return sorted(found)

            def p99(values: list[float]) -> float:
                return values[int(len(values) * 0.99)]

            await gaps()
            alone, memory = p99(await gaps()), resident_bytes()
            with clients(client.address, 1, 20, "1024") as started:
                await all_open(started)
                await eventually(lambda: simulated.loads().running == 20)
                beside = p99(await gaps())
                await eventually(lambda: simulated.loads().running == 0)
                assert resident_bytes() - memory <= 32 << 20
                assert beside <= 2 * alone
        await back_to_the_start(simulated, server)
        await exact(client, 5, 20)
