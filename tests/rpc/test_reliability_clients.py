"""Clients that die, sleep or dawdle: what they held comes back in time, and the others notice nothing."""

import asyncio
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from protocols import Ask, Front, fronting
from running_time import RunningTime, resident_bytes
from serving import ROOT, back_to_the_start, eventually, lent

from rpc.server_config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio


@contextmanager
def clients(
    protocol: str, front: Front, processes: int, streams: int, *window: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with so many open streams each, ended whatever happens."""
    listening = front.server.http if protocol == "http" else front.server
    assert listening is not None
    address = f"127.0.0.1:{listening.port}"
    command = [sys.executable, str(ROOT / "tests/rpc/many_streams.py"), protocol, address, str(streams), *window]
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


PROTOCOLS = ["native", "vllm", "http"]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_500_streams_whose_clients_are_killed_return_their_pages_within_2_s(
    simulated: "Engine", protocol: str
) -> None:
    async with fronting(lent(simulated)) as front:
        with clients(protocol, front, 5, 100) as started, RunningTime() as clock:
            await all_open(started)
            asks = [Ask(3 + number, 80) for number in range(9)]
            turns = itertools.cycle(front.speakers.values())
            survivors = [asyncio.create_task(speaker.run(ask)) for speaker, ask in zip(turns, asks, strict=False)]
            await eventually(lambda: simulated.loads().running == 509)
            for process in started:
                process.kill()
            killed = clock.seconds
            await eventually(lambda: simulated.loads().running <= 9)
            assert clock.seconds - killed <= 2.0
            assert not any(survivor.done() for survivor in survivors)
            for ask, survivor in zip(asks, survivors, strict=True):
                outcome = await survivor
                assert outcome.is_exact(ask), outcome
        await front.as_before()


async def test_a_client_that_sleeps_is_cancelled_within_the_keepalive_times_and_1_s(simulated: "Engine") -> None:
    config = ServerConfig(keepalive_interval=1.0, keepalive_timeout=1.0)
    async with fronting(lent(simulated), config) as front:
        with clients("native", front, 1, 10) as started, RunningTime() as clock:
            await all_open(started)
            ask = Ask(4, 100)
            survivor = asyncio.create_task(front.native.run(ask))
            await eventually(lambda: simulated.loads().running == 11)
            started[0].send_signal(signal.SIGSTOP)  # its sockets stay open and take what fits
            stopped = clock.seconds
            await eventually(lambda: simulated.loads().running <= 1)
            assert clock.seconds - stopped <= 1.0 + 1.0 + 1.0
            assert (await survivor).is_exact(ask)
        await back_to_the_start(simulated, front.server)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_20_slow_readers_cost_little_memory_and_no_neighbour_and_end_at_the_stall_limit(
    simulated: "Engine", protocol: str
) -> None:
    async with fronting(lent(simulated), ServerConfig(stall_limit=4.0)) as front:
        with RunningTime() as clock:

            async def p99() -> float:
                """Between the messages of eight streams, in this process's running time; of the best of three rounds,
                as what others do to the machine spoils one, and slow readers would spoil each."""
                rounds: list[float] = []
                for _ in range(3):
                    found: list[float] = []

                    async def follow(number: int, found: list[float] = found) -> None:
                        times: list[float] = []
                        ask = Ask(3 + number, 20, on_token=lambda count: times.append(clock.seconds) if count else None)
                        outcome = await front.speakers[protocol].run(ask)
                        assert outcome.is_exact(ask), outcome
                        found.extend(after - before for before, after in itertools.pairwise(times))

                    await asyncio.gather(*map(follow, range(8)))
                    rounds.append(sorted(found)[int(len(found) * 0.99)])
                return min(rounds)

            alone, memory = await p99(), resident_bytes()
            with clients(protocol, front, 1, 20, "1024") as started:
                await all_open(started)
                running = 20 * 8 if protocol == "http" else 20
                await eventually(lambda: simulated.loads().running == running)
                beside = await p99()
                await eventually(lambda: simulated.loads().running == 0)
                assert resident_bytes() - memory <= 32 << 20
                assert beside <= 2 * alone
        await front.as_before()
