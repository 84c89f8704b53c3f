"""Both clients take a resumable stream up by themselves, wherever its connection breaks: every token once, one ending."""

import asyncio
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from breaking_proxy import BreakingProxy
from serving import PATIENCE, back_to_the_start, eventually, lent, serving

from jaxserve.engine import Engine
from jaxserve.events import Completion, Delta, Event, Finished, FinishReason, Started, Timings, Usage
from jaxserve.request_errors import EngineUnavailable, StreamNotFound
from rpc.client import AsyncClient, Client, ConnectionLost, asynchronous, calls, recovery
from rpc.lifecycle import State

SEEDS = 50
TOKENS = 30
BREAKS = 3
"""Connections of each stream that break."""
STREAM_BYTES = 2500
"""About what passes for a stream that does not break."""


def prompt(length: int) -> dict[str, object]:
    return {"token_ids": list(range(300, 300 + length))}


@pytest.fixture(scope="module")
def resuming() -> Iterator[Engine]:
    with Engine(simulated_step_ms=4.0, slots=64, max_context=1024, resumable_streams=SEEDS + 10) as engine:
        yield engine


@dataclass(frozen=True)
class Case:
    seed: int

    @property
    def request(self) -> dict[str, object]:
        """Its prompt's length decides what the simulated device generates."""
        return {**prompt(10 + self.seed % 7), "n": 1 + self.seed % 2, "max_tokens": TOKENS, "ignore_eos": True}

    @property
    def breaks(self) -> list[int]:
        """Where its connections break: in the handshake, the request, the middle of a message, the trailers."""
        random_ = random.Random(self.seed)
        return [random_.randrange(STREAM_BYTES) for _ in range(BREAKS)]

    def check(self, events: list[Event], whole: Completion) -> None:
        assert sum(isinstance(event, Started) for event in events) == 1
        endings = [event for event in events if isinstance(event, Finished)]
        assert sorted(ending.index for ending in endings) == [output.index for output in whole.outputs]
        assert {ending.finish_reason for ending in endings} == {FinishReason.LENGTH}
        deltas = [event for event in events if isinstance(event, Delta)]
        for output in whole.outputs:
            own = [delta for delta in deltas if delta.index == output.index]
            assert tuple(token for delta in own for token in delta.token_ids) == output.token_ids, self.seed
            assert "".join(delta.text for delta in own) == output.text, self.seed


def read_blocking(address: str, request: dict[str, object], timeout: float | None = None) -> list[Event]:
    with Client(address) as client:
        return list(client.generate(request, timeout=timeout, resumable=True).events())


async def read(address: str, request: dict[str, object], timeout: float | None = None) -> list[Event]:
    async with AsyncClient(address) as client:
        return [event async for event in client.generate(request, timeout=timeout, resumable=True).events()]


async def test_wherever_its_connection_breaks_a_stream_is_whole(resuming: Engine) -> None:
    cases = [Case(seed) for seed in range(SEEDS)]
    wholes = await asyncio.to_thread(resuming.generate, [case.request for case in cases])
    async with serving(lent(resuming)) as (server, _):

        async def run(case: Case, threads: ThreadPoolExecutor) -> tuple[list[Event], int]:
            async with BreakingProxy(server.port, case.breaks) as proxy:
                if case.seed % 4 < 2:
                    return await read(proxy.address, case.request), proxy.broken
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(threads, read_blocking, proxy.address, case.request), proxy.broken

        with ThreadPoolExecutor(SEEDS) as threads:
            results = await asyncio.gather(*(run(case, threads) for case in cases))
        for case, whole, (events, _) in zip(cases, wholes, results, strict=True):
            case.check(events, whole)
        # A busy server sends fewer, larger messages, and a stream may end before its breaks.
        assert sum(broken for _, broken in results) > SEEDS // 2
        await back_to_the_start(resuming, server)


async def test_a_server_that_has_started_anew_says_that_the_stream_is_gone(resuming: Engine) -> None:
    with Engine(simulated_step_ms=4.0, slots=8, max_context=1024) as new:
        async with serving(lent(resuming)) as (server, _), BreakingProxy(server.port) as proxy:
            async with serving(lent(new)) as (restarted, _), AsyncClient(proxy.address) as client:
                generation = client.generate({**prompt(10), "max_tokens": 900, "ignore_eos": True}, resumable=True)
                events = generation.events()
                while generation.tokens < 5:
                    await anext(events)
                proxy.there = restarted.port
                proxy.cut()
                with pytest.raises(StreamNotFound, match="sent to a server that has ended") as error:
                    async for _ in events:
                        pass
                assert generation.request_id in str(error.value)
            assert resuming.abort(generation.request_id)
            await back_to_the_start(resuming, server)


async def test_a_server_that_stays_away_is_unavailable_and_another_client_goes_on(
    resuming: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "DELAY", 0.01)
    async with serving(lent(resuming)) as (server, client):
        async with BreakingProxy(server.port) as proxy, AsyncClient(proxy.address) as cut_off:
            generation = cut_off.generate({**prompt(10), "max_tokens": 900, "ignore_eos": True}, resumable=True)
            events = generation.events()
            while generation.tokens < 5:
                await anext(events)
            proxy.there = 1  # where nobody listens
            proxy.cut()
            with pytest.raises(ConnectionLost):
                async for _ in events:
                    pass
        again = client.attach(generation.request_id, generation.tokens).events()
        assert isinstance(await anext(again), Started)
        assert await client.abort(generation.request_id)
        assert [event.finish_reason async for event in again if isinstance(event, Finished)] == [FinishReason.ABORT]
        await back_to_the_start(resuming, server)


async def test_a_stream_that_is_taken_up_again_still_ends_at_its_timeout(resuming: Engine) -> None:
    """Behind the break a port that takes connections and says nothing."""
    request = {**prompt(10), "max_tokens": 900, "ignore_eos": True}
    async with serving(lent(resuming)) as (server, _):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with BreakingProxy(server.port, [STREAM_BYTES] * 2) as proxy:
                readers = (
                    read(proxy.address, request, timeout=1.5),
                    asyncio.to_thread(read_blocking, proxy.address, request, timeout=1.5),
                )
                reading = asyncio.gather(*readers, return_exceptions=True)
                await eventually(lambda: len(server.calls) == 2)
                proxy.there = silent.getsockname()[1]
                assert [type(error) for error in await reading] == [TimeoutError] * 2
                assert proxy.broken == 2
        await back_to_the_start(resuming, server)


async def test_who_leaves_a_server_that_says_nothing_is_not_held_up(
    resuming: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keepalive would find out after half a minute."""
    monkeypatch.setattr(calls, "ABORT_SECONDS", 0.1)
    request = {**prompt(10), "max_tokens": 900, "ignore_eos": True, "resumable": True}

    def leave(address: str, silence: Callable[[], None]) -> str:
        with Client(address) as client:
            generation = client.generate(request)
            for _ in generation:
                silence()
                break
        return generation.request_id

    async with serving(lent(resuming)) as (server, client), BreakingProxy(server.port) as proxy:
        left = await asyncio.wait_for(asyncio.to_thread(leave, proxy.address, proxy.be_silent), PATIENCE)
        proxy.delay = 0.0
        async with AsyncClient(proxy.address) as cut_off:
            generation = cut_off.generate(request)
            events = generation.events()
            while generation.tokens < 1:
                await anext(events)
            proxy.be_silent()
            await asyncio.wait_for(events.aclose(), PATIENCE)
        for request_id in (left, generation.request_id):
            assert await client.abort(request_id)
        await back_to_the_start(resuming, server)


async def test_what_a_server_refuses_itself_is_not_tried_again(resuming: Engine) -> None:
    async with serving(lent(resuming)) as (server, client):
        server.lifecycle.move_to(State.DRAINING)
        with pytest.raises(EngineUnavailable, match="draining") as error:
            await client.generate(prompt(10), resumable=True).text()
        assert not isinstance(error.value, ConnectionLost)


def test_the_last_text_of_a_sequence_and_its_end_are_each_new_once():
    """They follow all tokens: a stream that is taken up again may give either anew."""
    position = recovery.Position("r")
    ends = [Finished("r", index, FinishReason.STOP, Usage(1, 0, 3), Timings(0.0, 0.0, 0.0, 0.0)) for index in (0, 1)]
    events = [Delta("r", 0, (), "held"), ends[0], Delta("r", 1, (), "held"), ends[1]]
    assert [position.is_new(event) for event in events * 2] == [True] * 4 + [False] * 4


def test_a_stream_that_gives_nothing_is_taken_up_as_often_as_is_said_and_a_token_starts_the_count_anew():
    position = recovery.Position("r")
    policy = recovery.Recovery(lambda tokens: tokens, None)
    lost = ConnectionLost("gone")
    for tokens in (0, 5):
        position.tokens = tokens
        waits = [policy.after(lost, position) for _ in range(recovery.ATTEMPTS)]
        assert [delay for delay, _ in waits] == sorted({delay for delay, _ in waits})
        assert [call() for _, call in waits] == [tokens] * recovery.ATTEMPTS
    with pytest.raises(ConnectionLost) as error:
        policy.after(lost, position)
    assert error.value is lost


class BrokenCall:
    def cancel(self) -> None:
        pass

    async def __aiter__(self):
        raise ConnectionLost("gone")
        yield


class QuietCall:
    """One that says nothing until it is cancelled, and then what grpc.aio says."""

    def __init__(self) -> None:
        self._left = asyncio.Event()

    def cancel(self) -> None:
        self._left.set()

    async def __aiter__(self):
        await self._left.wait()
        raise asyncio.CancelledError
        yield


async def test_a_stream_that_is_cancelled_between_two_connections_ends_on_the_second(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recovery, "DELAY", 0.01)
    attached = asyncio.Event()

    def attach(_: int) -> QuietCall:
        attached.set()
        return QuietCall()

    generation = asynchronous.AsyncGeneration(BrokenCall(), "a", recovery.Recovery(attach, None))
    reading = asyncio.create_task(generation.text())
    await asyncio.sleep(0)
    assert not attached.is_set()
    generation.cancel()
    assert await asyncio.wait_for(reading, PATIENCE) == ""
    assert attached.is_set()
