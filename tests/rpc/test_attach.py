"""A stream taken up again after a broken connection: no token is lost or repeated, and nothing is kept for ever."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from serving import eventually, serving

from jaxserve.engine import Engine
from jaxserve.events import Delta, Finished, Started
from jaxserve.request import OutputParams, Request, StoppingParams
from jaxserve.request_errors import InvalidRequest, StreamNotFound, StreamTaken
from rpc.client import AsyncClient
from rpc.convert import event_from_proto
from rpc.server import Server

pytestmark = pytest.mark.asyncio

PROMPT = {"token_ids": list(range(300, 310))}


@pytest.fixture(scope="module")
def simulated() -> Iterator[Engine]:
    with Engine(simulated_step_ms=4.0, slots=8, max_context=1024, resumable_streams=4) as engine:
        yield engine


class Lent:
    """The module's engine, which outlives each test's server."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def drain(self) -> None:
        pass

    def shutdown(self, grace: float = 0.0) -> bool:
        return True


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[tuple[Server, AsyncClient]]:
    async with serving(Lent(engine)) as (server, client):  # pyright: ignore[reportArgumentType]
        yield server, client
    await eventually(lambda: engine.loads().running + engine.loads().waiting == 0)
    await eventually(lambda: engine.loads().available_pages == engine.loads().total_pages)


def fields(tokens: int = 60, **more: object) -> dict[str, object]:
    return {"max_tokens": tokens, "ignore_eos": True, "resumable": True, **more}


async def broken_after(client: AsyncClient, tokens: int, request: dict[str, object]) -> tuple[str, list[Delta]]:
    """Reads a stream until so many tokens have come, and lets its connection go without a word to the server."""
    generation = client.generate(PROMPT, **request)
    deltas: list[Delta] = []
    async for response in generation._call:
        event = event_from_proto(response)
        if isinstance(event, Delta):
            deltas.append(event)
        if sum(len(delta.token_ids) for delta in deltas) >= tokens:
            break
    generation._call.cancel()
    return generation.request_id, deltas


def of_index(deltas: list[Delta], index: int) -> tuple[tuple[int, ...], str]:
    own = [delta for delta in deltas if delta.index == index]
    return tuple(token for delta in own for token in delta.token_ids), "".join(delta.text for delta in own)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_goes_on_where_it_broke(simulated: Engine, n: int) -> None:
    (whole,) = await asyncio.to_thread(lambda: simulated.generate([PROMPT], max_tokens=60, ignore_eos=True, n=n))
    async with served(simulated) as (_, client):
        request_id, deltas = await broken_after(client, 10, fields(n=n))
        assert simulated.loads().running > 0
        received = sum(len(delta.token_ids) for delta in deltas)
        attached = client.attach(request_id, received)
        events = [event async for event in attached.events()]
        assert isinstance(events[0], Started)
        assert sorted(event.index for event in events if isinstance(event, Finished)) == list(range(n))
        deltas += [event for event in events if isinstance(event, Delta)]
    for output in whole.outputs:
        assert of_index(deltas, output.index) == (output.token_ids, output.text)


async def test_an_ended_stream_can_be_had_again_from_any_token(simulated: Engine) -> None:
    async with served(simulated) as (_, client):
        generation = client.generate(PROMPT, **fields(20))
        tokens = [token async for delta in generation for token in delta.token_ids]
        assert (await client.loads()).resumable_streams == simulated.loads().resumable_streams > 0
        for start in (0, 1, 7, 19, 20):
            again = client.attach(generation.request_id, start)
            assert [token async for delta in again for token in delta.token_ids] == tokens[start:]
            assert again.finished == generation.finished
        for beyond in (21, -1):
            with pytest.raises(InvalidRequest) as error:
                await client.attach(generation.request_id, beyond).text()
            assert error.value.field == "from_token"


async def test_what_is_not_kept_is_not_found(simulated: Engine) -> None:
    async with served(simulated) as (_, client):
        ordinary = client.generate(PROMPT, max_tokens=3, ignore_eos=True)
        await ordinary.text()
        for request_id in ("unknown", ordinary.request_id):
            with pytest.raises(StreamNotFound):
                await client.attach(request_id).text()
        with pytest.raises(InvalidRequest) as error:
            await client.generate(PROMPT, resumable=True, return_token_ids=False).text()
        assert error.value.field == "resumable"


async def test_the_second_reader_takes_over_from_the_first(simulated: Engine) -> None:
    async with served(simulated) as (_, client):
        first = client.generate(PROMPT, **fields(200))
        reading = first.events()
        await anext(reading)
        second = client.attach(first.request_id)
        with pytest.raises(StreamTaken):
            async for _ in reading:
                await asyncio.sleep(0)
        assert await client.abort(first.request_id) in (True, False)
        await second.text()
        assert second.finished is not None


async def test_only_the_tenant_of_a_stream_can_take_it_up(simulated: Engine) -> None:
    request = Request(
        token_ids=tuple(PROMPT["token_ids"]),
        stopping=StoppingParams(max_tokens=3, ignore_eos=True),
        output=OutputParams(resumable=True),
    )
    stream = simulated.submit(replace(request, tenant="mine"))
    assert sum(isinstance(event, Finished) for event in stream) == 1
    with pytest.raises(StreamNotFound):
        simulated.attach(stream.request_id, 0, "other")
    assert isinstance(next(simulated.attach(stream.request_id, 0, "mine")), Started)


async def test_a_request_that_nobody_takes_up_is_aborted_and_forgotten() -> None:
    with Engine(simulated_step_ms=2.0, slots=2, max_context=4096, resumable_seconds=0.5) as engine:
        async with served(engine) as (_, client):
            request_id, _ = await broken_after(client, 5, fields(4000))
            await eventually(lambda: engine.loads().running == 0)
            await asyncio.sleep(1.0)
            with pytest.raises(StreamNotFound):
                await client.attach(request_id).text()


class BreakingProxy:
    """Passes bytes on to a port, and cuts its connections on demand."""

    def __init__(self, port: int):
        self._there = port
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "BreakingProxy":
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._there)
        self._writers += [writer, there_writer]
        self._pumps.append(asyncio.ensure_future(self._pump(reader, there_writer)))
        self._pumps.append(asyncio.ensure_future(self._pump(there_reader, writer)))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except ConnectionError:
            pass  # cut
        finally:
            writer.transport.abort()


async def test_the_client_takes_its_stream_up_by_itself(simulated: Engine) -> None:
    (whole,) = await asyncio.to_thread(lambda: simulated.generate([PROMPT], max_tokens=150, ignore_eos=True))
    async with served(simulated) as (server, _), BreakingProxy(server.port) as proxy:
        async with AsyncClient(f"127.0.0.1:{proxy.port}") as client:
            generation = client.generate(PROMPT, **fields(150))
            tokens: list[int] = []
            text: list[str] = []
            cuts = 0
            async for delta in generation:
                tokens += delta.token_ids
                text.append(delta.text)
                if len(tokens) >= 30 * (cuts + 1) and cuts < 3:
                    cuts += 1
                    proxy.cut()
        assert cuts == 3
        assert tuple(tokens) == whole.token_ids
        assert "".join(text) == whole.text
        assert generation.finished is not None
