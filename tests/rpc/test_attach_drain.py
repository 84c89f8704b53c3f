"""What a stop does with resumable requests whose reader has gone: they finish, and a reader may come until the end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from jaxserve.engine import Engine
from jaxserve.events import FinishReason
from jaxserve.request_errors import EngineUnavailable
from rpc.client import AsyncClient
from rpc.lifecycle import State
from rpc.server import Server
from rpc.server_config import ServerConfig

STEP_MS = 4.0


@asynccontextmanager
async def serving_its_own() -> AsyncIterator[tuple[Engine, Server, AsyncClient]]:
    """A server whose engine ends with it."""
    engine = await asyncio.to_thread(Engine, simulated_step_ms=STEP_MS, slots=4, max_context=4096)
    server = Server(ServerConfig(grpc_port=0, keepalive_timeout=3600.0), report=lambda _: None)
    await server.start()
    await server.attach(engine)
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield engine, server, client
    finally:
        await server.stop(grace=0.0)


async def detached(client: AsyncClient, tokens: int) -> str:
    """The id of a resumable request that runs and has no reader."""
    generation = client.generate(
        {"token_ids": list(range(300, 310))}, max_tokens=tokens, ignore_eos=True, resumable=True
    )
    async for _ in generation._call:
        break
    generation._call.cancel()  # as a broken connection does: without a word of leaving
    return generation.request_id


async def test_a_stop_finishes_requests_without_a_reader_who_may_come_meanwhile() -> None:
    async with serving_its_own() as (engine, server, client):
        taken_up, left = await detached(client, 300), await detached(client, 400)
        stopping = asyncio.create_task(server.stop(grace=3600.0))
        while server.lifecycle.state is not State.DRAINING:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineUnavailable, match="draining"):
            await client.generate({"token_ids": [300]}).text()
        attached = client.attach(taken_up)
        assert sum([len(delta.token_ids) async for delta in attached]) == 300
        assert attached.finished is not None and attached.finished.finish_reason is FinishReason.LENGTH
        assert await stopping, "not every request finished by itself"
        whole = [event async for event in engine.attach(left, 400)]
        assert getattr(whole[-1], "finish_reason", None) is FinishReason.LENGTH


@pytest.mark.parametrize("by", ["grace", "hurry"])
async def test_past_the_grace_or_in_a_hurry_they_are_aborted_and_the_stop_says_so(by: str) -> None:
    async with serving_its_own() as (engine, server, client):
        request_id = await detached(client, 4000)
        stopping = asyncio.create_task(server.stop(grace=0.2 if by == "grace" else 3600.0))
        if by == "hurry":
            await asyncio.sleep(0.1)
            assert not stopping.done()
            server.hurry()
        assert not await stopping
        (finished,) = [event async for event in engine.attach(request_id, 0) if hasattr(event, "finish_reason")]
        assert getattr(finished, "finish_reason", None) is FinishReason.ABORT
